"""Layers that carry a state along a sequence, such as linear attention, on packed documents and while decoding.

Such a layer's own code takes rows of a batch, with padding on the left that its mask names. Documents that are packed
end to end become such rows for this layer alone; nothing passes between them.

Shapes: T packed tokens, R rows, L tokens of the longest row, H hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Forward(Protocol):
    """A layer's own code."""

    def __call__(self, x_RLH: torch.Tensor, *, mask_RL: torch.Tensor | None, cache: Any) -> torch.Tensor:
        """Hidden states to hidden states of the same shape. `mask_RL`: False for padding; None for no padding.
        `cache`: transformers' `Cache` of this layer, which is given its state, or None."""
        ...


class Recurrence(Protocol):
    """How one layer of a forward sees its sequences."""

    def __call__(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """[b, s, H] -> [b, s, H]."""
        ...


class DocumentRows:
    """Packed documents, each of which is a row."""

    def __init__(
        self,
        starts_R: torch.Tensor,
        lengths_R: torch.Tensor,
        prefix_starts_R: torch.Tensor | None = None,
        prefix_lengths_R: torch.Tensor | None = None,
    ) -> None:
        """Where each row's own tokens are, and those of a prefix before them, whose outputs are not wanted. All int64
        on the model's device. Rows are in the order of their own tokens, which are all T."""
        none_R = torch.zeros_like(lengths_R)
        prefix_R = none_R if prefix_lengths_R is None else prefix_lengths_R
        before_R = none_R if prefix_starts_R is None else prefix_starts_R
        total_R = prefix_R + lengths_R
        longest = int(total_R.max())
        place_RL = torch.arange(longest, device=lengths_R.device) - (longest - total_R)[:, None]
        self._mask_RL = place_RL >= 0
        is_own_RL = place_RL >= prefix_R[:, None]
        index_RL = torch.where(is_own_RL, (starts_R - prefix_R)[:, None] + place_RL, before_R[:, None] + place_RL)
        self._index = torch.where(self._mask_RL, index_RL, 0).flatten()
        self._own_T = is_own_RL.flatten().nonzero()[:, 0]

    @classmethod
    def of_documents(cls, lengths_B: torch.Tensor) -> DocumentRows:
        return cls(lengths_B.cumsum(0) - lengths_B, lengths_B)

    def __call__(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        return self.run(forward, x, None)

    def run(self, forward: Forward, x_1TH: torch.Tensor, cache: Any) -> torch.Tensor:
        x_RLH = x_1TH[0].index_select(0, self._index).unflatten(0, self._mask_RL.shape)
        out_RLH = forward(x_RLH, mask_RL=self._mask_RL, cache=cache)
        return out_RLH.flatten(0, 1).index_select(0, self._own_T)[None]


class KeepingState:
    """Packed documents whose states at their ends are kept."""

    def __init__(self, rows: DocumentRows) -> None:
        self._rows = rows
        self.state = _empty_state()

    def __call__(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        return self._rows.run(forward, x, self.state)


class Continuing:
    """Tokens without padding, one for each row, which continue from the row's state and move it."""

    def __init__(self, state: Any) -> None:
        """`state`: a `KeepingState`'s, which is this object's from now on."""
        self._state = state

    @classmethod
    def from_nothing(cls) -> Continuing:
        """Before the first token of a sequence."""
        return cls(_empty_state())

    def __call__(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        return forward(x, mask_RL=None, cache=self._state)

    def keep(self, rows: torch.Tensor) -> None:
        """Have the state of these rows: indices, int64, in which one may come several times."""
        self._state.reorder_cache(rows)

    def tensors(self) -> list[torch.Tensor]:
        """What a step changes in place."""
        (layer,) = self._state.layers
        return [x for x in (*layer.conv_states.values(), *layer.recurrent_states.values()) if x is not None]


class Unpadded:
    """Rows without padding, and no state kept."""

    def __call__(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        return forward(x, mask_RL=None, cache=None)


def _empty_state() -> Any:
    from transformers.cache_utils import Cache, LinearAttentionLayer

    return Cache(layers=[LinearAttentionLayer()])
