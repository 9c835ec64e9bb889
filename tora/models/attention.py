"""How queries meet keys: packed documents in training, a key-value cache in decoding.

An attention context is called once a layer and replaces torchtune's `mask`, which its layers hand through untouched.
Shape letters: T packed tokens, B sequences, L longest sequence, S cache slots, H query heads, K key-value heads, D
head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class AttentionContext(Protocol):
    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [b, s, H, D], k and v [b, s, K, D] -> [b, s, H, D]."""
        ...


def _sdpa(q_BHLD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    # a comparison of head counts could be a symbol to the compiler, which this argument may not be
    return F.scaled_dot_product_attention(
        q_BHLD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


class PackedAttention:
    """Causal attention within each of several documents that lie end to end in one row.

    Documents are set side by side, padded on the right, for the attention alone: causality keeps every real token from
    seeing the padding, so no mask is needed and the fast kernels apply. Linear layers never see padding.
    """

    def __init__(self, lengths_B: torch.Tensor) -> None:
        """`lengths_B` int64 on the model's device."""
        longest = int(lengths_B.max())
        starts_B = lengths_B.cumsum(0) - lengths_B
        column_L = torch.arange(longest, device=lengths_B.device)
        inside_BL = column_L < lengths_B[:, None]
        self.shape = (len(lengths_B), longest)
        self.pad_BL = torch.where(inside_BL, starts_B[:, None] + column_L, 0).flatten()
        self.unpad_T = inside_BL.flatten().nonzero()[:, 0]

    def _documents(self, x_1TND: torch.Tensor) -> torch.Tensor:
        """[1, T, n, D] -> [B, n, L, D]"""
        return x_1TND[0].index_select(0, self.pad_BL).unflatten(0, self.shape).transpose(1, 2)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out_BHLD = _sdpa(self._documents(q), self._documents(k), self._documents(v), None)
        return out_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad_T)[None]


class PrefillAttention(PackedAttention):
    """Packed attention that keeps each layer's keys and values for a cache."""

    def __init__(self, lengths_B: torch.Tensor) -> None:
        super().__init__(lengths_B)
        self.keys: list[torch.Tensor] = []
        """Per layer [B, K, L, D]; what lies beyond a document's length is meaningless."""
        self.values: list[torch.Tensor] = []

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.keys.append(self._documents(k))
        self.values.append(self._documents(v))
        return super().__call__(layer, q, k, v)


class CachedAttention:
    """One new token a row against everything the row holds already. Rows have lengths of their own."""

    def __init__(self, prefill: PrefillAttention, lengths_B: torch.Tensor, rows_B: torch.Tensor, room: int) -> None:
        """Row b continues prefilled document `rows_B[b]`, of length `lengths_B[b]`, by up to `room` tokens."""
        self.lengths_B = lengths_B.clone()
        self.longest = int(lengths_B.max())  # kept on the host, so that no step waits for the device
        self.keys = [F.pad(k.index_select(0, rows_B), (0, 0, 0, room)) for k in prefill.keys]
        self.values = [F.pad(v.index_select(0, rows_B), (0, 0, 0, room)) for v in prefill.values]
        self._column_S = torch.arange(self.keys[0].shape[2], device=lengths_B.device)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        where_BK1D = self.lengths_B.view(-1, 1, 1, 1).expand(-1, k.shape[2], 1, k.shape[3])
        keys, values = self.keys[layer], self.values[layer]
        keys.scatter_(2, where_BK1D, k.transpose(1, 2))
        values.scatter_(2, where_BK1D, v.transpose(1, 2))
        used = self.longest + 1
        seen_B11S = (self._column_S[:used] <= self.lengths_B[:, None])[:, None, None]
        out = _sdpa(q.transpose(1, 2), keys[:, :, :used], values[:, :, :used], seen_B11S)
        return out.transpose(1, 2)

    def advance(self) -> None:
        """After all layers have seen a token."""
        self.lengths_B += 1
        self.longest += 1

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (indices)."""
        self.lengths_B = self.lengths_B[rows]
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
