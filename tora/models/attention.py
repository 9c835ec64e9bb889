"""How queries meet keys: packed documents in training, a key-value cache in decoding.

A layer's attention replaces torchtune's `mask`, which its layers hand through untouched.
Shape letters: T packed tokens, B sequences, L longest sequence, S cache slots, H query heads, K key-value heads, D
head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class LayerAttention(Protocol):
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [b, s, H, D], k and v [b, s, K, D] -> [b, s, H, D]."""
        ...


class AttentionContext(Protocol):
    def at(self, layer: int) -> LayerAttention:
        """Layers are asked for in order. All of a kind, so that compiled layers share one graph."""
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

    def at(self, layer: int) -> LayerAttention:
        return self

    def _documents(self, x_1TND: torch.Tensor) -> torch.Tensor:
        """[1, T, n, D] -> [B, n, L, D]"""
        return x_1TND[0].index_select(0, self.pad_BL).unflatten(0, self.shape).transpose(1, 2)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out_BHLD = _sdpa(self._documents(q), self._documents(k), self._documents(v), None)
        return out_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad_T)[None]


class PrefillAttention(PackedAttention):
    """Packed attention that keeps each layer's keys and values for a cache."""

    def __init__(self, lengths_B: torch.Tensor) -> None:
        super().__init__(lengths_B)
        self.keys: list[torch.Tensor] = []
        """Per layer [B, K, L, D]; what lies beyond a document's length is meaningless."""
        self.values: list[torch.Tensor] = []

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.keys.append(self._documents(k))
        self.values.append(self._documents(v))
        return super().__call__(q, k, v)


_GROWTH = 8 * 17
"""Slots that a full cache gains, and the multiple that it begins with. Eights suit the kernels; 17 is no factor of any
model's width, which the compiler would else take to be the cache's length by rule, and compile again for the next."""


class CachedAttention:
    """One new token a row against everything the row holds already. Rows have lengths of their own.

    The cache has a fixed number of slots, and every step attends to all of them under a mask: a step's shapes and
    addresses stay what they are until `advance` finds the cache full, or `keep` drops rows.
    """

    def __init__(
        self,
        prefill: PrefillAttention,
        lengths_B: torch.Tensor,
        rows_B: torch.Tensor,
        positions_B: torch.Tensor | None = None,
    ) -> None:
        """Row b continues prefilled document `rows_B[b]`, of length `lengths_B[b]`. Its next token has the position
        `positions_B[b]`, which is its length where nothing is said: images take fewer positions than tokens."""
        self._longest = int(lengths_B.max())  # kept on the host, so that no step waits for the device
        self._size = _round_up(self._longest + 1)
        self.lengths_B = lengths_B.clone()
        self.positions_B = (lengths_B if positions_B is None else positions_B).clone()
        room = self._size - prefill.keys[0].shape[2]
        self._layers = [
            _LayerCache(*(F.pad(x.index_select(0, rows_B), (0, 0, 0, room)) for x in layer))
            for layer in zip(prefill.keys, prefill.values, strict=True)
        ]
        self._share()

    def at(self, layer: int) -> LayerAttention:
        return self._layers[layer]

    def advance(self) -> None:
        """After all layers have seen a token."""
        self.lengths_B += 1
        self.positions_B += 1
        self._longest += 1
        if self._longest == self._size:
            self._size = _round_up(self._size + 1)
            for layer in self._layers:
                layer.keys, layer.values = (F.pad(x, (0, 0, 0, _GROWTH)) for x in (layer.keys, layer.values))
            self._share()
        else:
            self.seen_B11S.copy_(self._seen())

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (indices)."""
        self.lengths_B, self.positions_B = self.lengths_B[rows], self.positions_B[rows]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self._share()

    def _seen(self) -> torch.Tensor:
        """The slots that each row may see once its next token is written, [B, 1, 1, S]."""
        slots_S = torch.arange(self._size, device=self.lengths_B.device)
        return (slots_S <= self.lengths_B[:, None])[:, None, None]

    def _share(self) -> None:
        self.seen_B11S = self._seen()
        for layer in self._layers:
            layer.lengths_B, layer.seen_B11S = self.lengths_B, self.seen_B11S


class _LayerCache:
    """A layer's keys and values [B, K, S, D], and what all layers share."""

    lengths_B: torch.Tensor
    seen_B11S: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        where_BK1D = self.lengths_B.view(-1, 1, 1, 1).expand(-1, k.shape[2], 1, k.shape[3])
        self.keys.scatter_(2, where_BK1D, k.transpose(1, 2))
        self.values.scatter_(2, where_BK1D, v.transpose(1, 2))
        return _sdpa(q.transpose(1, 2), self.keys, self.values, self.seen_B11S).transpose(1, 2)


def _round_up(slots: int) -> int:
    return -(-slots // _GROWTH) * _GROWTH
