"""What a new policy version does to running sequences: `rollout.update`.

vLLM keys its prefix cache by the adapter's name and the tokens up to each block. Adapter names here identify the
weights that computed a block, so two requests share a block only if the same weights computed it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from actors.vllm_engine.requests import LoadedPolicy, Slot


class WeightUpdate(Protocol):
    num_slots: int
    """Adapter slots needed; 0 for whole weights."""
    async_scheduling: bool | None
    """vLLM's argument; None for its default."""

    def slot(self, version: int) -> Slot:
        """Where to install a version."""
        ...

    def must_wait(self, num_running: int) -> bool:
        """Whether a slot used by `num_running` unfinished requests must not be overwritten yet."""
        ...

    def on_installed(self, llm: Any, policy: LoadedPolicy) -> None:
        """Called between two steps, as soon as the policy is in its slot."""
        ...

    def versions(self, sample: Any, began: LoadedPolicy) -> np.ndarray:
        """[L] int64: the version of each token of vLLM's `CompletionOutput`. `began`: the newest policy when the
        request began."""
        ...


class BetweenRollouts:
    """A request keeps the version that it began with. Slots form a ring, one for each version that may be in flight."""

    async_scheduling: bool | None = None

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; an engine needs at least 1")
        self.num_slots = num_slots

    def slot(self, version: int) -> Slot:
        return 1 + version % self.num_slots

    def must_wait(self, num_running: int) -> bool:
        return num_running > 0

    def on_installed(self, llm: Any, policy: LoadedPolicy) -> None:
        """Nothing to do: requests name their version's adapter."""

    def versions(self, sample: Any, began: LoadedPolicy) -> np.ndarray:
        return np.full(len(sample.token_ids), began.version, np.int64)


class WholeWeights(BetweenRollouts):
    """Each version replaces the model's own weights, so it waits for the last rollout of the previous version."""

    def __init__(self) -> None:
        self.num_slots = 0

    def slot(self, version: int) -> Slot:
        return None

    def on_installed(self, llm: Any, policy: LoadedPolicy) -> None:
        """Cached blocks have no adapter name and belong to the old version, so all caches are emptied."""
        was_emptied = llm.reset_prefix_cache()
        assert was_emptied, "a block of vLLM's prefix cache was in use between two rollouts"
        llm.reset_encoder_cache()
        llm.reset_mm_cache()  # vLLM emptied the worker's half when it reloaded the weights


class InFlight:
    """Running requests continue under the new version, in the only slot."""

    num_slots = 1
    # With async scheduling vLLM prepares a step while the previous one runs, and labels the running step with the wrong
    # version.
    async_scheduling: bool | None = False

    def __init__(self, *, recompute_kv: bool) -> None:
        """`recompute_kv`: recompute the keys and values of running requests under the new version, instead of keeping
        them."""
        self._recompute_kv = recompute_kv

    def slot(self, version: int) -> Slot:
        return 1

    def must_wait(self, num_running: int) -> bool:
        return False

    def on_installed(self, llm: Any, policy: LoadedPolicy) -> None:
        llm.set_weight_version(str(policy.version))
        if self._recompute_kv:
            llm.reset_prefix_cache(reset_running_requests=True)
            llm.reset_encoder_cache()
        scheduler = llm.engine_core.engine_core.scheduler
        block_size = scheduler.kv_cache_manager.block_pool.hash_block_size
        for request in scheduler.requests.values():
            if request.lora_request is not None and request.lora_request.lora_int_id == policy.slot:
                _move_to(request, policy, block_size)

    def versions(self, sample: Any, began: LoadedPolicy) -> np.ndarray:
        return np.concatenate([np.full(s.end - s.start, int(s.version)) for s in sample.weight_versions])


def _move_to(request: Any, policy: LoadedPolicy, block_size: int) -> None:
    """Move vLLM's unfinished `Request` to the new policy's name, and rehash the blocks that it has yet to compute.

    A request that has computed nothing belongs to the new version like any later one. A request that continues has keys
    and values from more than one version, so its further blocks are named after the request and shared with no other.
    """
    assert policy.lora is not None
    old, is_fresh = request.lora_request, request.num_computed_tokens == 0
    name = policy.lora.lora_name if is_fresh else f"{policy.lora.lora_name}+{request.request_id}"
    request.lora_request = type(old)(name, old.lora_int_id, policy.lora.lora_path)
    del request.block_hashes[request.num_computed_tokens // block_size :]
    # The outputs of an adapted vision tower are cached by adapter name and image hash. vLLM's worker knows a request
    # that has already run by the old name.
    if is_fresh and request.num_preemptions == 0:
        request.mm_features = [
            replace(f, identifier=name + f.identifier.removeprefix(old.lora_name))
            if f.identifier.startswith(f"{old.lora_name}:")
            else f
            for f in request.mm_features
        ]
    request.update_block_hashes()
