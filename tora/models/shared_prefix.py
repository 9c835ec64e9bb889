"""Attention for completions that share their group's prompt, which passes through the model once.

Shape letters: T packed tokens, B sequences, P prompts, L longest completion, S longest prompt and longest completion
together, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from functools import cached_property

import torch

from tora.models.attention import PLAIN, AttentionContext, LayerAttention, PackedAttention, Scores, sdpa
from tora.models.recurrence import DocumentRows, Recurrence
from tora.models.varlen import VarlenAttention, supports_varlen


class SharedPrefixAttention:
    """All prompts come first in the row, then the completions. A prompt attends causally to itself; a completion
    attends to all of its prompt and causally to itself.

    As in `PackedAttention`, documents become rows of a batch for the attention alone. A completion's keys are those of
    its prompt followed by its own, which needs a mask: B x L x S booleans, computed once for all layers. Its queries
    are its own only, so no product is computed twice.
    """

    def __init__(self, prompt_lengths_P: torch.Tensor, lengths_B: torch.Tensor, prompt_B: torch.Tensor) -> None:
        """The fields of `MicroBatch`, int64 on the model's device."""
        device = lengths_B.device
        self._lengths = prompt_lengths_P, lengths_B, prompt_B
        self._prompts = PackedAttention(prompt_lengths_P)
        starts_P = prompt_lengths_P.cumsum(0) - prompt_lengths_P
        starts_B = prompt_lengths_P.sum() + lengths_B.cumsum(0) - lengths_B
        prompt_column = torch.arange(int(prompt_lengths_P.max()), device=device)
        own_column_L = torch.arange(int(lengths_B.max()), device=device)

        in_prompt = prompt_column < prompt_lengths_P[prompt_B, None]
        in_own_BL = own_column_L < lengths_B[:, None]
        prompt_index = torch.where(in_prompt, starts_P[prompt_B, None] + prompt_column, 0)
        own_index_BL = torch.where(in_own_BL, starts_B[:, None] + own_column_L, 0)
        self._query_shape = own_index_BL.shape
        self._query_BL = own_index_BL.flatten()
        key_index_BS = torch.cat([prompt_index, own_index_BL], 1)
        self._key_shape = key_index_BS.shape
        self._key_BS = key_index_BS.flatten()
        self._unpad = in_own_BL.flatten().nonzero()[:, 0]

        self._span = int((prompt_lengths_P[prompt_B] + lengths_B).max())
        self._query_place_BL = prompt_lengths_P[prompt_B, None] + own_column_L
        prompt_place = prompt_column.expand(len(lengths_B), -1)
        self._key_place_BS = torch.cat([prompt_place, self._query_place_BL], 1)
        causal_LL = own_column_L[:, None] >= own_column_L
        shape = (len(lengths_B), len(own_column_L), -1)
        self._mask_B1LS = torch.cat([in_prompt[:, None].expand(shape), causal_LL.expand(shape)], 2)[:, None]

    def at(self, layer: int) -> LayerAttention:
        return self

    def recurrent_at(self, layer: int) -> Recurrence:
        return self._rows

    @cached_property
    def _rows(self) -> DocumentRows:
        """The prompts, and each completion behind its prompt, which a layer with a state computes again."""
        prompt_lengths_P, lengths_B, prompt_B = self._lengths
        own_R = torch.cat([prompt_lengths_P, lengths_B])
        starts_R = own_R.cumsum(0) - own_R
        before_R = torch.cat([starts_R[: len(prompt_lengths_P)], starts_R[prompt_B]])
        prefix_R = torch.cat([torch.zeros_like(prompt_lengths_P), prompt_lengths_P[prompt_B]])
        return DocumentRows(starts_R, own_R, before_R, prefix_R)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        mask_B1LS, window = self._mask_B1LS, scores.window
        if window is not None and self._span > window:
            distance_BLS = self._query_place_BL[:, :, None] - self._key_place_BS[:, None]
            mask_B1LS = mask_B1LS & (distance_BLS < window)[:, None]
        q_BHLD = _rows(q, self._query_BL, self._query_shape)
        k_BHSD, v_BHSD = (_repeat_heads(_rows(x, self._key_BS, self._key_shape), q.shape[2]) for x in (k, v))
        out_BHLD = sdpa(q_BHLD, k_BHSD, v_BHSD, mask_B1LS, scores, grouped=False)
        completions = out_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, self._unpad)[None]
        return torch.cat([self._prompts(q, k, v, scores), completions], 1)


def _rows(x_1TND: torch.Tensor, index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Select tokens by `index` into rows: [1, T, n, D] -> [B, n, L or S, D]."""
    return x_1TND[0].index_select(0, index).unflatten(0, shape).transpose(1, 2)


def _repeat_heads(x_BKSD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, K, S, D] -> [B, H, S, D]; GPU kernels with a mask do not support grouped heads."""
    return x_BKSD.repeat_interleave(num_heads // x_BKSD.shape[1], 1)


def training_attention(
    prompt_lengths_P: torch.Tensor, lengths_B: torch.Tensor, prompt_B: torch.Tensor, dtype: torch.dtype
) -> AttentionContext:
    """The attention for a micro-batch's layout, on its device and in the model's `dtype`. The arrays are those of
    `MicroBatch`; no shared prompts means an empty `prompt_lengths_P`."""
    if len(prompt_lengths_P) == 0:
        return (VarlenAttention if supports_varlen(lengths_B.device, dtype) else PackedAttention)(lengths_B)
    return SharedPrefixAttention(prompt_lengths_P, lengths_B, prompt_B)
