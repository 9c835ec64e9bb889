"""Attention: causal within packed documents for training and prefill, over a key-value cache for decoding.

A layer of ours receives its attention function as torchtune's `mask` argument, which torchtune's layers pass on
unchanged; a layer of transformers' as a keyword argument: see `tora.models.generic`.

Shape letters: T packed tokens, B sequences, L longest sequence, S cache slots, H query heads, K key-value heads, D
head size; b and s are any batch and sequence size, n either number of heads.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from tora.models.recurrence import Continuing, DocumentRows, KeepingState, Recurrence


class Scores(NamedTuple):
    """How a layer computes its attention scores. A tuple, because layers are compiled."""

    scale: float | None = None
    """None for 1/√D."""
    window: int | None = None
    """A token sees itself and the `window` - 1 tokens before it; None for all before it."""
    cap: float | None = None
    """Scores become cap · tanh(score / cap) before the mask."""


PLAIN = Scores()


class LayerAttention(Protocol):
    """The attention of one layer, on rotated queries and keys."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        """q [b, s, H, D], k and v [b, s, K, D] -> [b, s, H, D]."""
        ...


class AttentionContext(Protocol):
    """The attention of all layers in one forward."""

    def at(self, layer: int) -> LayerAttention:
        """The attention of one layer; called for layers in order. Every layer gets the same type, so that compiled
        layers share one graph."""
        ...

    def recurrent_at(self, layer: int) -> Recurrence:
        """The same for a layer that carries a state in place of attention."""
        ...


def sdpa(
    q_BHLD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    mask: torch.Tensor | None,
    scores: Scores = PLAIN,
    *,
    grouped: bool = True,
) -> torch.Tensor:
    """[B, H, L, D]. `mask`: what each query sees, the window included, bool, broadcastable to [B, H, L, S]; None for
    causal. With a cap, for which torch has no kernel, scores are held in full. `grouped`: K may be less than H."""
    scale, cap = scores.scale, scores.cap
    if cap is None:
        # an argument, because comparing head counts could give the compiler a symbol, which it rejects here
        return F.scaled_dot_product_attention(
            q_BHLD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    groups = q_BHLD.shape[1] // k_BKSD.shape[1]
    k_BHSD, v_BHSD = k_BKSD.repeat_interleave(groups, 1), v_BKSD.repeat_interleave(groups, 1)
    scores_BHLS = (q_BHLD @ k_BHSD.transpose(2, 3)).float() * (q_BHLD.shape[3] ** -0.5 if scale is None else scale)
    scores_BHLS = (scores_BHLS / cap).tanh() * cap
    if mask is None:
        mask = causal(q_BHLD.shape[2], None, q_BHLD.device)
    return scores_BHLS.masked_fill(~mask, -torch.inf).softmax(3).to(v_BHSD.dtype) @ v_BHSD


def causal(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[length, length] bool: which tokens each token of a document sees."""
    place = torch.arange(length, device=device)
    distance_LL = place[:, None] - place
    seen_LL = distance_LL >= 0
    return seen_LL if window is None else seen_LL & (distance_LL < window)


class PackedAttention:
    """Causal attention within each of several documents packed end to end in one row.

    For the attention alone, documents become rows of a batch, padded on the right. Causality keeps every real token
    from seeing padding, so no mask is needed and the fast kernels apply. Linear layers never see padding.
    """

    def __init__(self, lengths_B: torch.Tensor) -> None:
        """`lengths_B`: int64 on the model's device."""
        self._lengths_B = lengths_B
        longest = int(lengths_B.max())
        starts_B = lengths_B.cumsum(0) - lengths_B
        column_L = torch.arange(longest, device=lengths_B.device)
        inside_BL = column_L < lengths_B[:, None]
        self.shape = (len(lengths_B), longest)
        self.pad_BL = torch.where(inside_BL, starts_B[:, None] + column_L, 0).flatten()
        self.unpad_T = inside_BL.flatten().nonzero()[:, 0]

    def at(self, layer: int) -> LayerAttention:
        return self

    def recurrent_at(self, layer: int) -> Recurrence:
        return self.rows

    @cached_property
    def rows(self) -> DocumentRows:
        return DocumentRows.of_documents(self._lengths_B)

    def _documents(self, x_1TND: torch.Tensor) -> torch.Tensor:
        """[1, T, n, D] -> [B, n, L, D]"""
        return x_1TND[0].index_select(0, self.pad_BL).unflatten(0, self.shape).transpose(1, 2)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        longest, window = self.shape[1], scores.window
        mask = None if window is None or longest <= window else causal(longest, window, q.device)
        out_BHLD = sdpa(self._documents(q), self._documents(k), self._documents(v), mask, scores)
        return out_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad_T)[None]


class PrefillAttention(PackedAttention):
    """Packed attention that also records each layer's keys and values, or state, for `CachedAttention`."""

    def __init__(self, lengths_B: torch.Tensor) -> None:
        super().__init__(lengths_B)
        self.layers: list[int] = []
        """The layers that have keys and values, in order."""
        self.keys: list[torch.Tensor] = []
        """Of each of them [B, K, L, D]; entries beyond a document's length are undefined."""
        self.values: list[torch.Tensor] = []
        self.states: dict[int, KeepingState] = {}
        """Of the other layers."""

    def at(self, layer: int) -> LayerAttention:
        self.layers.append(layer)
        return self

    def recurrent_at(self, layer: int) -> Recurrence:
        self.states[layer] = KeepingState(self.rows)
        return self.states[layer]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        self.keys.append(self._documents(k))
        self.values.append(self._documents(v))
        return super().__call__(q, k, v, scores)


_GROWTH = 8 * 17
"""The number of slots is a multiple of this. A full cache grows by a quarter, so that CUDA graphs are recorded again
only a few times. Kernels prefer multiples of 8. No model's
width is a multiple of 17: otherwise the compiler could assume that width and cache length are related, and recompile
when the cache grows."""


class CachedAttention:
    """Attention of one new token per row to all earlier tokens of its row. Rows may have different lengths.

    The cache has a fixed number of slots, and every step attends to all of them under a mask. So the shapes and
    addresses of a step stay the same until `advance` grows a full cache or `keep` drops rows.
    """

    def __init__(
        self,
        prefill: PrefillAttention,
        lengths_B: torch.Tensor,
        rows_B: torch.Tensor,
        positions_B: torch.Tensor | None = None,
    ) -> None:
        """Row b continues prefilled document `rows_B[b]`, of length `lengths_B[b]`. Its next token has position
        `positions_B[b]`, by default the length; images take fewer positions than tokens. All int64 [B]. The states of
        `prefill` are this object's from now on."""
        self._longest = int(lengths_B.max())  # kept on the host, so that no step synchronises with the device
        self._size = _round_up(self._longest + 1)
        self.lengths_B = lengths_B.clone()
        self.positions_B = (lengths_B if positions_B is None else positions_B).clone()
        room = self._size - prefill.shape[1]
        self._layers = {
            layer: _LayerCache(*(F.pad(x.index_select(0, rows_B), (0, 0, 0, room)) for x in keys_and_values))
            for layer, *keys_and_values in zip(prefill.layers, prefill.keys, prefill.values, strict=True)
        }
        self._recurrent = {layer: Continuing(keeping.state) for layer, keeping in prefill.states.items()}
        for state in self._recurrent.values():
            state.keep(rows_B)
        self._update_layers()

    def at(self, layer: int) -> LayerAttention:
        return self._layers[layer]

    def recurrent_at(self, layer: int) -> Recurrence:
        return self._recurrent[layer]

    def states(self) -> list[torch.Tensor]:
        """What a step does not write anew but moves on, in place."""
        return [tensor for state in self._recurrent.values() for tensor in state.tensors()]

    def advance(self) -> None:
        """Make room for the next token; call after all layers have processed one."""
        self.lengths_B += 1
        self.positions_B += 1
        self._longest += 1
        if self._longest == self._size:
            before, self._size = self._size, _round_up(self._size + self._size // 4 + 1)
            room = self._size - before
            for layer in self._layers.values():
                layer.keys, layer.values = (F.pad(x, (0, 0, 0, room)) for x in (layer.keys, layer.values))
            self._update_layers()
        else:
            self.mask_B11S.copy_(self._mask())

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows (indices, int64) and drop the others."""
        self.lengths_B, self.positions_B = self.lengths_B[rows], self.positions_B[rows]
        for layer in self._layers.values():
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        for state in self._recurrent.values():
            state.keep(rows)
        self._update_layers()

    def _mask(self) -> torch.Tensor:
        """The slots that each row attends to once its next token is written, [B, 1, 1, S] bool."""
        slots_S = torch.arange(self._size, device=self.lengths_B.device)
        return (slots_S <= self.lengths_B[:, None])[:, None, None]

    def _update_layers(self) -> None:
        self.mask_B11S = self._mask()
        for layer in self._layers.values():
            layer.lengths_B, layer.mask_B11S = self.lengths_B, self.mask_B11S


class _LayerCache:
    """One layer's keys and values, [B, K, S, D], with the lengths and mask that all layers share."""

    lengths_B: torch.Tensor
    mask_B11S: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        slot_B111 = self.lengths_B.view(-1, 1, 1, 1)
        self.keys.scatter_(2, slot_B111.expand(-1, k.shape[2], 1, k.shape[3]), k.transpose(1, 2))
        self.values.scatter_(2, slot_B111.expand(-1, v.shape[2], 1, v.shape[3]), v.transpose(1, 2))
        mask_B11S = self.mask_B11S
        if scores.window is not None:
            slots_S = torch.arange(self.keys.shape[2], device=q.device)
            mask_B11S = mask_B11S & (slots_S > slot_B111 - scores.window)
        # The query heads of a key-value head are a sequence of queries: the same products as with `enable_gqa`, for
        # which torch has no fused kernel on a GPU when there is a mask.
        q_BKGD = q[:, 0].unflatten(1, (k.shape[2], -1))
        out_BKGD = sdpa(q_BKGD, self.keys, self.values, mask_B11S, scores, grouped=False)
        return out_BKGD.flatten(1, 2)[:, None]


def _round_up(slots: int) -> int:
    return -(-slots // _GROWTH) * _GROWTH
