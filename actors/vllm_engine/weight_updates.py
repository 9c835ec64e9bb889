"""What a new policy version means for the sequences that are running: `rollout.update`.

vLLM keys its prefix cache by the adapter's name and a block's place in the sequence, so a name stands for the weights
that computed a block, and no two requests share a block unless those were the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from actors.vllm_engine.requests import LoadedPolicy, Slot


class WeightUpdate(Protocol):
    num_slots: int
    """Adapter slots that it needs; 0 where snapshots are of whole weights."""
    async_scheduling: bool | None
    """vLLM's argument; None is its own choice."""

    def slot(self, version: int) -> Slot:
        """Where a version goes."""
        ...

    def must_wait(self, num_running: int) -> bool:
        """Whether a slot that so many unfinished requests use may not be overwritten yet."""
        ...

    def written(self, llm: Any, policy: LoadedPolicy) -> None:
        """Called between two steps, once the policy is in its slot."""
        ...

    def versions(self, sample: Any, began: LoadedPolicy) -> np.ndarray:
        """The version of each token of vLLM's `CompletionOutput`, [L] int64. `began`: the newest when it began."""
        ...


class BetweenRollouts:
    """A request keeps the version that it began with: as many slots as versions that may be in flight, in a ring."""

    async_scheduling: bool | None = None

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; an engine needs at least 1")
        self.num_slots = num_slots

    def slot(self, version: int) -> Slot:
        return 1 + version % self.num_slots

    def must_wait(self, num_running: int) -> bool:
        return num_running > 0

    def written(self, llm: Any, policy: LoadedPolicy) -> None:
        """A version's requests know it by name."""

    def versions(self, sample: Any, began: LoadedPolicy) -> np.ndarray:
        return np.full(len(sample.token_ids), began.version, np.int64)


class WholeWeights(BetweenRollouts):
    """There is one policy, in place of the model's own weights: a new one waits for the last rollout of the old."""

    def __init__(self) -> None:
        self.num_slots = 0

    def slot(self, version: int) -> Slot:
        return None

    def written(self, llm: Any, policy: LoadedPolicy) -> None:
        """What was cached without an adapter's name was the old policy's."""
        emptied = llm.reset_prefix_cache()
        assert emptied, "a block of vLLM's prefix cache was in use between two rollouts"
        llm.reset_encoder_cache()
        llm.reset_mm_cache()  # the worker's half went with the weights


class InFlight:
    """Running requests go on under the new version, in the one slot."""

    num_slots = 1
    # Else vLLM has a step under way while its scheduler prepares the next, and labels the one with the other's version.
    async_scheduling: bool | None = False

    def __init__(self, *, recompute_kv: bool) -> None:
        """`recompute_kv`: compute the keys and values of what a request has so far again, instead of keeping them."""
        self._recompute_kv = recompute_kv

    def slot(self, version: int) -> Slot:
        return 1

    def must_wait(self, num_running: int) -> bool:
        return False

    def written(self, llm: Any, policy: LoadedPolicy) -> None:
        llm.set_weight_version(str(policy.version))
        if self._recompute_kv:
            llm.reset_prefix_cache(reset_running_requests=True)
            llm.reset_encoder_cache()
        scheduler = llm.engine_core.engine_core.scheduler
        block_size = scheduler.kv_cache_manager.block_pool.hash_block_size
        for request in scheduler.requests.values():
            if request.lora_request is not None:
                _carry(request, policy, block_size)

    def versions(self, sample: Any, began: LoadedPolicy) -> np.ndarray:
        return np.concatenate([np.full(s.end - s.start, int(s.version)) for s in sample.weight_versions])


def _carry(request: Any, policy: LoadedPolicy, block_size: int) -> None:
    """Give vLLM's unfinished `Request` the policy's name, and the blocks that it has yet to compute their new keys.

    A request that has computed nothing is the new version's like any other. The keys and values of one that goes on
    come of more than one version, so its further blocks get a name that no other request has.
    """
    assert policy.lora is not None
    old, is_fresh = request.lora_request, request.num_computed_tokens == 0
    name = policy.lora.lora_name if is_fresh else f"{policy.lora.lora_name}+{request.request_id}"
    request.lora_request = type(old)(name, old.lora_int_id, policy.lora.lora_path)
    del request.block_hashes[request.num_computed_tokens // block_size :]
    # The outputs of a tower with an adapter are cached under the adapter's name and the image's hash. A request that
    # has run is known to vLLM's worker under the old name.
    if is_fresh and request.num_preemptions == 0:
        request.mm_features = [
            replace(f, identifier=name + f.identifier.removeprefix(old.lora_name))
            if f.identifier.startswith(f"{old.lora_name}:")
            else f
            for f in request.mm_features
        ]
    request.update_block_hashes()
