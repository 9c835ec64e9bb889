"""Log-probs of chosen tokens without ever holding the logits of all positions.

Forward and backward go through the tokens in chunks; between them stay the hidden states, the targets and the softmax's
normalisers. The backward makes each chunk's logits again: a third product with the head, for memory that does not grow
with tokens x vocabulary.

Shape letters: N response tokens, C those of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = 1 << 27
"""Of one chunk's logits in float32; at most two and a half times as much is held at once. 128 MiB are 220 tokens of a
vocabulary of 151,936: enough rows for a product that is not bound by reading the head."""


def token_logprobs(
    hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(head · hidden / temperature) at the targets, and the distributions' entropies; both [N] float32.

    Log-probs carry a gradient to the hidden states and, where it is trained, to the head's weight; entropies none.
    """
    return _TokenLogprobs.apply(hidden_NH, head_VH, targets_N, temperature)  # pyright: ignore[reportReturnType]


def _chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    rows = max(1, _CHUNK_BYTES // (4 * vocab_size))
    return (slice(start, start + rows) for start in range(0, num_tokens, rows))


def _logits(hidden_CH: torch.Tensor, head_VH: torch.Tensor, temperature: float) -> torch.Tensor:
    """[C, V] float32, the caller's to overwrite; the product itself is in the head's dtype."""
    return F.linear(hidden_CH, head_VH).float().div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # apart, not views of one tensor: FSDP2 hooks what a module returns, and warns of views
        logprobs_N, normaliser_N, entropy_N = (
            hidden_NH.new_empty(len(targets_N), dtype=torch.float32) for _ in range(3)
        )
        for c in _chunks(len(targets_N), len(head_VH)):
            logits_CV = _logits(hidden_NH[c], head_VH, temperature)
            normaliser_N[c] = logits_CV.logsumexp(1)
            log_p_CV = logits_CV.sub_(normaliser_N[c, None])
            logprobs_N[c] = log_p_CV.gather(1, targets_N[c, None])[:, 0]
            entropy_N[c] = -log_p_CV.exp().mul_(log_p_CV).sum(1)
        ctx.save_for_backward(hidden_NH, head_VH, targets_N, normaliser_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """With g upstream, d/dlogits = g (onehot - softmax) / temperature."""
        hidden_NH, head_VH, targets_N, normaliser_N = ctx.saved_tensors
        scale_N1 = gradient_N[:, None] / ctx.temperature
        to_hidden = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        to_head = torch.zeros_like(head_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for c in _chunks(len(targets_N), len(head_VH)):
            logits_CV = _logits(hidden_NH[c], head_VH, ctx.temperature)
            softmax_CV = logits_CV.sub_(normaliser_N[c, None]).exp_()
            change_CV = softmax_CV.mul_(-scale_N1[c]).scatter_add_(1, targets_N[c, None], scale_N1[c])
            change_CV = change_CV.to(head_VH.dtype)
            if to_hidden is not None:
                to_hidden[c] = change_CV @ head_VH
            if to_head is not None:
                to_head += change_CV.T @ hidden_NH[c]
        return to_hidden, None if to_head is None else to_head.to(head_VH.dtype), None, None
