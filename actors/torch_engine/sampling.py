"""Draw tokens and compute their log-probs.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import torch

from tora.types import Sampling


def truncate(logits_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set to -inf the logits outside the `top_k` largest, or outside the smallest set whose probability reaches
    `top_p`."""
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


def log_distribution(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[B, V] float32: log-probs of the distribution that `sampling` draws from; at temperature 1 if it is greedy."""
    logits_BV = logits_BV.float()
    if sampling.temperature > 0:
        logits_BV = logits_BV / sampling.temperature
    return truncate(logits_BV, sampling.top_k, sampling.top_p).log_softmax(1)


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
