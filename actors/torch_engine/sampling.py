"""Draw tokens and compute their log-probs.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch

from tora.types import Sampling


def penalize(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Repetition penalty (CTRL, arXiv:1909.05858, section 4.1), with the sign rule of vLLM and transformers: positive
    logits of seen tokens are divided by it, negative ones multiplied."""
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def truncate(logits_BV: torch.Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> torch.Tensor:
    """Set to -inf the logits of tokens less probable than `min_p` times the most probable one, then those outside the
    `top_k` largest, then those outside the smallest set whose probability reaches `top_p`. This is vLLM's order."""
    if min_p > 0:
        largest_B1 = logits_BV.max(1, keepdim=True).values
        logits_BV = logits_BV.masked_fill(logits_BV < largest_B1 + math.log(min_p), -torch.inf)
    if 0 < top_k < logits_BV.shape[1]:
        smallest_B1 = logits_BV.topk(top_k, dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p < 1:
        ordered_BV, order_BV = logits_BV.sort(dim=1, descending=True)
        probability_BV = ordered_BV.softmax(1)
        before_BV = probability_BV.cumsum(1) - probability_BV  # the most probable token always stays
        drop_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(drop_BV, -torch.inf)
    return logits_BV


def log_policy(logits_BV: torch.Tensor, temperature: float) -> torch.Tensor:
    """[B, V] float32: log-probs of the policy, the softmax over the whole vocabulary at `temperature`; at 1 where
    that is 0."""
    logits_BV = logits_BV.float()
    return (logits_BV / temperature if temperature > 0 else logits_BV).log_softmax(1)


def log_distribution(logits_BV: torch.Tensor, sampling: Sampling, seen_BV: torch.Tensor | None = None) -> torch.Tensor:
    """[B, V] float32: log-probs of the distribution that `sampling` draws from; at temperature 1 if it is greedy.

    `seen_BV`, which a repetition penalty needs: bool, the tokens that each row contains so far.
    """
    logits_BV = logits_BV.float()
    if sampling.repetition_penalty != 1:
        assert seen_BV is not None
        logits_BV = penalize(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature > 0:
        logits_BV = logits_BV / sampling.temperature
    return truncate(logits_BV, sampling.top_k, sampling.top_p, sampling.min_p).log_softmax(1)


def draw(logprobs_BV: torch.Tensor, uniform_B: torch.Tensor, greedy: bool) -> torch.Tensor:
    """One token per row, [B] int64, by inverting the cumulative distribution at `uniform_B` in [0, 1).

    A row's token depends only on its own random number, so a rollout does not depend on its neighbours in the batch.
    Sums are in float64, because a float32 sum loses the tail of a large vocabulary.
    """
    if greedy:
        return logprobs_BV.argmax(1)
    cumulative_BV = logprobs_BV.double().exp().cumsum(1)
    target_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp_max(logprobs_BV.shape[1] - 1)
