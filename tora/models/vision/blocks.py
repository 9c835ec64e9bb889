"""Attention in which all features of an image see each other, as in Gemma 3 (arXiv:2503.19786, section 2).

Every other token's attention is that of the context it wraps. Shape letters: T packed tokens, I images, L placeholders
of the longest image, S tokens that its longest document has up to its end, H query heads, K key-value heads, D head
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from tora.models.attention import PLAIN, AttentionContext, LayerAttention, Scores, sdpa
from tora.models.recurrence import Recurrence
from tora.models.vision.places import Places


@dataclass(frozen=True, slots=True)
class Blocks:
    """The images of a forward, on the model's device. Rows are padded."""

    query_IL: torch.Tensor
    """int64: indices in T of an image's placeholders."""
    key_IS: torch.Tensor
    """int64: indices in T of the tokens of its document up to its end."""
    distance_ILS: torch.Tensor
    """int64: how far a key is before a query; negative after it."""
    own_IS: torch.Tensor
    """bool: which keys are of the image."""
    valid_IS: torch.Tensor
    """bool: which keys are no padding."""
    row_N: torch.Tensor
    """int64: the placeholders in the flattened `query_IL`."""
    target_N: torch.Tensor
    """int64: the same in T."""


def blocks_of(places: Places, device: torch.device) -> Blocks:
    """Each run of placeholders is one image."""
    index_M = places.index_M
    cuts = [0, *(np.flatnonzero(np.diff(index_M) != 1) + 1), len(index_M)]
    queries = [index_M[a:b] for a, b in pairwise(cuts)]
    keys = []
    for run in queries:
        document, branch, end = places.document_T[run[0]], places.branch_T[run[0]], places.positions_T[run[-1]]
        mine = (
            (places.document_T == document)
            & ((places.branch_T == -1) | (places.branch_T == branch))
            & (places.positions_T <= end)
        )
        keys.append(np.flatnonzero(mine))
    query_IL, in_query_IL = _padded(queries)
    key_IS, valid_IS = _padded(keys)
    place = places.positions_T
    distance_ILS = place[query_IL][:, :, None] - place[key_IS][:, None]
    own_IS = np.stack([np.isin(row, run) for row, run in zip(key_IS, queries, strict=True)]) & valid_IS
    arrays = (query_IL, key_IS, distance_ILS, own_IS, valid_IS, np.flatnonzero(in_query_IL), query_IL[in_query_IL])
    return Blocks(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))


def _padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length, filled with the first entry of each; and which entries are its own."""
    longest = max(map(len, rows))
    filled = np.stack([np.concatenate([row, np.full(longest - len(row), row[0])]) for row in rows])
    return filled, np.stack([np.arange(longest) < len(row) for row in rows])


class BlockAttention:
    """An attention context in which the placeholders of each image also see each other."""

    def __init__(self, inner: AttentionContext, blocks: Blocks) -> None:
        self._inner, self._blocks = inner, blocks

    def at(self, layer: int) -> LayerAttention:
        return _LayerBlocks(self._inner.at(layer), self._blocks)

    def recurrent_at(self, layer: int) -> Recurrence:
        return self._inner.recurrent_at(layer)


class _LayerBlocks:
    def __init__(self, inner: LayerAttention, blocks: Blocks) -> None:
        self._inner, self._blocks = inner, blocks

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        b = self._blocks
        out_1THD = self._inner(q, k, v, scores)
        seen_ILS = b.distance_ILS >= 0
        if scores.window is not None:
            seen_ILS = seen_ILS & (b.distance_ILS < scores.window)
        seen_ILS = (seen_ILS | b.own_IS[:, None]) & b.valid_IS[:, None]
        q_IHLD = q[0][b.query_IL].transpose(1, 2)
        groups = q.shape[2] // k.shape[2]
        k_IHSD, v_IHSD = (x[0][b.key_IS].transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
        own_IHLD = sdpa(q_IHLD, k_IHSD, v_IHSD, seen_ILS[:, None], scores, grouped=False)
        own_NHD = own_IHLD.transpose(1, 2).flatten(0, 1).index_select(0, b.row_N)
        return out_1THD.index_copy(1, b.target_N, own_NHD[None])
