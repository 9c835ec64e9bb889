"""Log-probs of chosen tokens without ever holding the logits of all positions.

Shape letters: N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 1 << 25
"""Logits of one chunk: 128 MiB in float32."""


def chunk_logprobs(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at the targets, and the distribution's entropy; both [N] float32."""
    logits_NV = head(hidden).float() / temperature
    normaliser_N = logits_NV.logsumexp(1)
    logprobs_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - normaliser_N
    with torch.no_grad():
        entropy_N = normaliser_N - (torch.softmax(logits_NV, 1) * logits_NV).sum(1)
    return logprobs_N, entropy_N


def token_logprobs(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunk_logprobs` in chunks. With gradients on, each chunk's logits are made again in the backward pass."""
    rows = max(1, _CHUNK_ELEMENTS // vocab_size)
    parts = []
    for hidden_part, targets_part in zip(hidden.split(rows), targets_N.split(rows), strict=True):
        if torch.is_grad_enabled() and len(targets_N) > rows:
            part = checkpoint(chunk_logprobs, head, hidden_part, targets_part, temperature, use_reentrant=False)
        else:
            part = chunk_logprobs(head, hidden_part, targets_part, temperature)
        parts.append(part)
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])
