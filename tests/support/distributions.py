"""What a request draws from, by transformers' own logits processors in float64."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tora.types import Sampling

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.3},
    "all": {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
}


def expected(logits_LV: torch.Tensor, ids: list[int], start: int, sampling: Sampling) -> tuple[torch.Tensor, ...]:
    """Log-probs [L] of `ids[start:]` under the policy and under the distribution that they are drawn from.

    `logits_LV`: of the positions that predict them.
    """
    warpers: list[Any] = [hf.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.repetition_penalty != 1:
        warpers.insert(0, hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.min_p:
        warpers.append(hf.MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warpers.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(sampling.top_p))
    policy, drawn = [], []
    for at, logits_V in zip(range(start, len(ids)), logits_LV.double(), strict=True):
        scores_1V = logits_V[None]
        policy.append((scores_1V / sampling.temperature).log_softmax(1)[0, ids[at]])
        for warper in warpers:
            scores_1V = warper(torch.tensor([ids[:at]]), scores_1V)
        drawn.append(scores_1V.log_softmax(1)[0, ids[at]])
    return torch.stack(policy), torch.stack(drawn)
