"""Log-probs of given tokens without materialising the logits of all positions.

Forward and backward process the tokens in chunks; between them only the hidden states, the targets and the softmax
normalisers are kept. The backward recomputes each chunk's logits: one more product with the head, in exchange for
memory that does not grow with tokens x vocabulary.

Shape letters: N response tokens, C tokens of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tora.models.head import LogitMap, head_logits

CHUNK_BYTES = 1 << 27
"""Size of one chunk's float32 logits; peak memory is at most 2.5 times as much. 128 MiB hold 220 tokens of a vocabulary
of 151,936, enough rows on a CPU that the product is not bound by reading the head."""
_GPU_CHUNKS = 4
"""A GPU computes so many chunks at once, because it multiplies faster than it reads, beside what it holds anyway."""


_PLAIN = LogitMap()


def token_logprobs(
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float,
    fp32: bool = False,
    logit_map: LogitMap = _PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logit_map(head · hidden) / temperature) at the targets, and the entropy of each distribution; both
    [N] float32, in nats.

    Both carry a gradient to the hidden states and, if it is trained, to the head's weight. That of entropies costs
    nothing where a loss does not use them. `fp32`: as for `head_logits`.
    """
    return _TokenLogprobs.apply(hidden_NH, head_VH, targets_N, temperature, fp32, logit_map)  # pyright: ignore[reportReturnType]


def _chunks(num_tokens: int, head_VH: torch.Tensor) -> Iterator[slice]:
    size = CHUNK_BYTES * (_GPU_CHUNKS if head_VH.device.type == "cuda" else 1)
    rows = max(1, size // (4 * len(head_VH)))
    return (slice(start, start + rows) for start in range(0, num_tokens, rows))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_NH: torch.Tensor,
        head_VH: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
        fp32: bool,
        logit_map: LogitMap,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # separate tensors: FSDP2 hooks what a module returns, and warns about views
        logprobs_N, normaliser_N, entropy_N = (
            hidden_NH.new_empty(len(targets_N), dtype=torch.float32) for _ in range(3)
        )
        for c in _chunks(len(targets_N), head_VH):
            logits_CV = logit_map(head_logits(hidden_NH[c], head_VH, fp32=fp32)).div_(temperature)
            normaliser_N[c] = logits_CV.logsumexp(1)
            log_p_CV = logits_CV.sub_(normaliser_N[c, None])
            logprobs_N[c] = log_p_CV.gather(1, targets_N[c, None])[:, 0]
            entropy_N[c] = -log_p_CV.exp().mul_(log_p_CV).sum(1)
        ctx.save_for_backward(hidden_NH, head_VH, targets_N, normaliser_N, entropy_N)
        ctx.temperature, ctx.fp32, ctx.logit_map = temperature, fp32, logit_map
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient_N: torch.Tensor | None, entropy_gradient_N: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """With g the gradient of a log-prob and h that of an entropy H, the gradient of the logits is
        (g (onehot - p) - h p (log p + H)) / temperature, p being the softmax, times the slope of the map."""
        hidden_NH, head_VH, targets_N, normaliser_N, entropy_N = ctx.saved_tensors
        gradient_N = torch.zeros_like(normaliser_N) if gradient_N is None else gradient_N
        scale_N1 = gradient_N[:, None] / ctx.temperature
        grad_hidden = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for c in _chunks(len(targets_N), head_VH):
            logits_CV = ctx.logit_map(head_logits(hidden_NH[c], head_VH, fp32=ctx.fp32))
            slope = ctx.logit_map.slope(logits_CV)
            log_p_CV = logits_CV.div_(ctx.temperature).sub_(normaliser_N[c, None])
            factors = -scale_N1[c]  # of p in each logit's gradient
            if entropy_gradient_N is not None:
                factors = factors - (entropy_N[c, None] + log_p_CV) * (entropy_gradient_N[c, None] / ctx.temperature)
            grad_logits_CV = log_p_CV.exp_().mul_(factors).scatter_add_(1, targets_N[c, None], scale_N1[c])
            if not isinstance(slope, float) or slope != 1:
                grad_logits_CV = grad_logits_CV.mul_(slope)
            grad_logits_CV = grad_logits_CV.to(head_VH.dtype)
            if grad_hidden is not None:
                grad_hidden[c] = grad_logits_CV @ head_VH
            if grad_head is not None:
                grad_head += grad_logits_CV.T @ hidden_NH[c]
        return grad_hidden, None if grad_head is None else grad_head.to(head_VH.dtype), None, None, None, None
