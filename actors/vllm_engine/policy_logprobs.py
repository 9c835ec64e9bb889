"""Log-probs of the whole softmax beside those of the distribution that vLLM 0.32 draws from.

Penalties and truncation (top-k, top-p, min-p) change what is drawn. The learner scores tokens under the whole softmax
at the same temperature, so its ratio to the engine is 1 for equal policies only if the engine reports that too. vLLM
reports one kind or the other. A request that penalises or truncates asks for one extra log-prob (`logprobs=1`), and the
sampler's column for it is overwritten here with the sampled token's log-prob under softmax(logits / temperature).

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

_GREEDY = 1e-5
"""vLLM treats a lower temperature as greedy and leaves the logits as they are."""


def install() -> None:
    """Wrap the samplers of both model runners. Call before the model is built."""
    from vllm.v1.sample.sampler import Sampler

    wrap_v1(Sampler)
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:  # without it there is no V2 runner
        from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2

        wrap_v2(SamplerV2)


def token_logprobs(logits_BV: torch.Tensor, temperature_B: torch.Tensor | None, token_B: torch.Tensor) -> torch.Tensor:
    """[B] float32: log softmax(logits / temperature) at the tokens; None stands for greedy rows, at temperature 1."""
    logits_BV = logits_BV.float()
    if temperature_B is not None:
        logits_BV = logits_BV / torch.where(temperature_B < _GREEDY, 1.0, temperature_B)[:, None]
    return logits_BV.gather(1, token_B.long()[:, None])[:, 0] - logits_BV.logsumexp(1)


def wrap_v1(sampler: Any) -> None:
    inner = sampler.forward
    if getattr(inner, "reports_policy", False):
        return

    def forward(self: Any, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        if not sampling_metadata.max_num_logprobs:
            return inner(self, logits, sampling_metadata, *args, **kwargs)
        untouched = logits.clone()  # vLLM penalises and tempers float32 logits in place
        output = inner(self, logits, sampling_metadata, *args, **kwargs)
        _report(output, untouched, sampling_metadata.temperature)
        return output

    forward.reports_policy = True  # pyright: ignore[reportFunctionMemberAccess]
    sampler.forward = forward


def wrap_v2(sampler: Any) -> None:
    inner = sampler.__call__
    if getattr(inner, "reports_policy", False):
        return

    def call(self: Any, logits: torch.Tensor, input_batch: Any) -> Any:
        output = inner(self, logits, input_batch)  # copies logits before it changes them
        temperature_B = self.sampling_states.temperature.gpu[input_batch.expanded_idx_mapping]
        _report(output, logits, temperature_B)
        return output

    call.reports_policy = True  # pyright: ignore[reportFunctionMemberAccess]
    sampler.__call__ = call


def _report(output: Any, logits_BV: torch.Tensor, temperature_B: torch.Tensor | None) -> None:
    tensors = output.logprobs_tensors
    if tensors is None or tensors.logprobs.shape[1] < 2:
        return
    tensors.logprobs[:, 1] = token_logprobs(logits_BV, temperature_B, output.sampled_token_ids[:, 0])
