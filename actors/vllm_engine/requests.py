"""Conversions between Tora's types and vLLM 0.32's requests and outputs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tora.types import Completion, PolicySnapshot, SampleRequest

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest


_MIN_TEMPERATURE = 0.01
"""vLLM silently clamps lower values, and the learner would score under a different distribution."""


Slot = int | None
"""vLLM's id for an adapter slot, from 1; None where the snapshot replaces the model's own weights."""


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy version that the engine holds."""

    version: int
    slot: Slot
    lora: LoRARequest | None
    """None for whole weights."""
    sha256: str
    """`PolicySnapshot.sha256`."""


def loaded_policy(slot: Slot, snapshot: PolicySnapshot, *, pinned: bool = False) -> LoadedPolicy:
    """Names the adapter by version and content, because vLLM keys its prefix and encoder caches by that name. The
    version alone is not enough: a run resumed from a checkpoint reaches the same version number again. To vLLM two
    adapters of one name are one, so a pinned one has another name than the same policy in the ring."""
    from vllm.lora.request import LoRARequest

    name = f"policy@{snapshot.version}:{snapshot.sha256[:16]}{':pinned' if pinned else ''}"
    lora = LoRARequest(name, slot, f"mem://{snapshot.version}") if slot is not None else None
    return LoadedPolicy(snapshot.version, slot, lora, snapshot.sha256)


def sampling_params(request: SampleRequest) -> SamplingParams:
    """Raises ValueError if vLLM cannot sample this way."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    if 0 < sampling.temperature < _MIN_TEMPERATURE:
        raise ValueError(f"temperature {sampling.temperature} is below vLLM's minimum, {_MIN_TEMPERATURE}; 0 is greedy")
    try:
        return SamplingParams(
            n=1 if sampling.temperature == 0 else request.num_samples,
            seed=_hashed(request.seed),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            stop=list(sampling.stop),
            ignore_eos=True,  # only the request's own stop tokens count
            logprobs=int(sampling.reshapes),  # the sampled token's, and the policy's: see `policy_logprobs`
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,  # a stop string may be one
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except VLLMClientError as error:
        raise ValueError(str(error)) from error


def _hashed(seed: int) -> int:
    """vLLM gives sample i the seed `seed + i`, so neighbouring seeds would share samples."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:6])


def pinned_versions(sample: Any, began: LoadedPolicy) -> np.ndarray:
    """[L] int64: see `WeightUpdate.versions`. No new version reaches a pinned request."""
    return np.full(len(sample.token_ids), began.version, np.int64)


def scoring_params() -> SamplingParams:
    """For the log-probs of the prompt's own tokens, which vLLM always reports at temperature 1."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,  # only the prompt tokens'; vLLM then skips the prefix cache
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion(output: Any, versions_L: np.ndarray) -> Completion:
    """From vLLM's `CompletionOutput` of a finished request."""
    token_ids = np.asarray(output.token_ids, dtype=np.int64)
    flat = np.asarray(output.logprobs.logprobs, dtype=np.float32)
    sampling_logprobs = flat[output.logprobs.start_indices]
    logprobs = flat[np.asarray(output.logprobs.end_indices) - 1]  # a column of its own where a request reshapes
    assert output.finish_reason in ("stop", "length"), f"vLLM ended a request with {output.finish_reason!r}"
    assert logprobs.shape == token_ids.shape, "vLLM returned a different number of log-probs than tokens"
    assert versions_L.shape == token_ids.shape, "vLLM returned versions for a different number of tokens"
    return Completion(token_ids, logprobs, sampling_logprobs, versions_L, output.finish_reason == "stop")


def completion_logprobs(output: Any, length: int) -> np.ndarray:
    """[length] float32: for the last `length` tokens of the prompt, from vLLM's `RequestOutput` for
    `scoring_params`."""
    flat = output.prompt_logprobs
    return np.asarray([flat.logprobs[i] for i in flat.start_indices[-length:]], dtype=np.float32)
