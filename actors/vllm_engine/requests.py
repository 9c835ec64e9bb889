"""Requests to vLLM 0.32 and its answers, in Tora's types."""

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
"""vLLM raises a lower one to this without a word, and the learner would score under another distribution."""


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy version in an adapter slot, or in slot 0, the weights themselves."""

    version: int
    slot: int
    lora: LoRARequest | None
    """None for whole weights."""
    sha256: str
    """The sender's."""


def loaded_policy(slot: int, snapshot: PolicySnapshot) -> LoadedPolicy:
    """vLLM's prefix and encoder caches are keyed by the adapter's name: by version, and by content too, because a run
    that resumed from a checkpoint comes to a version number for the second time."""
    from vllm.lora.request import LoRARequest

    name = f"policy@{snapshot.version}:{snapshot.sha256[:16]}"
    lora = LoRARequest(name, slot, f"mem://{snapshot.version}") if slot else None
    return LoadedPolicy(snapshot.version, slot, lora, snapshot.sha256)


def sampling_params(request: SampleRequest) -> SamplingParams:
    """Errors: ValueError for what vLLM cannot sample."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    if 0 < sampling.temperature < _MIN_TEMPERATURE:
        raise ValueError(f"temperature {sampling.temperature} is below vLLM's least, {_MIN_TEMPERATURE}; 0 is greedy")
    try:
        return SamplingParams(
            n=1 if sampling.temperature == 0 else request.num_samples,
            seed=_spread(request.seed),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # stop tokens are those of the request, none of the model's
            logprobs=int(sampling.reshapes),  # the sampled token's, and the policy's: see `policy_logprobs`
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except VLLMClientError as error:
        raise ValueError(str(error)) from error


def _spread(seed: int) -> int:
    """vLLM gives sample i the seed `seed + i`: neighbouring seeds would share samples."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:6])


def scoring_params() -> SamplingParams:
    """For log-probs of the prompt's own tokens; vLLM reports them untempered whatever it samples with."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,  # of the prompt's tokens alone; vLLM then takes nothing from the prefix cache
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
    assert logprobs.shape == token_ids.shape, "vLLM returned other log-probs than the sampled tokens'"
    assert versions_L.shape == token_ids.shape, "vLLM returned versions of other tokens than it sampled"
    return Completion(token_ids, logprobs, sampling_logprobs, versions_L, output.finish_reason == "stop")


def completion_logprobs(output: Any, length: int) -> np.ndarray:
    """[length] float32: of the last tokens of the prompt, from vLLM's `RequestOutput` to `scoring_params`."""
    flat = output.prompt_logprobs
    return np.asarray([flat.logprobs[i] for i in flat.start_indices[-length:]], dtype=np.float32)
