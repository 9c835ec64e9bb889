"""Rows that are drawn when they are first read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, overload

Row = dict[str, Any]


class DrawnRows(Sequence[Row]):
    """`num_rows` rows, drawn in order from one generator: reading row i draws those before it too, once."""

    def __init__(self, num_rows: int, rng: random.Random, draw: Callable[[random.Random], Row]) -> None:
        self._num_rows, self._rng, self._draw = num_rows, rng, draw
        self._drawn: list[Row] = []

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        wanted = range(self._num_rows)[index]
        last = max(wanted, default=-1) if isinstance(wanted, range) else wanted
        while len(self._drawn) <= last:
            self._drawn.append(self._draw(self._rng))
        return [self._drawn[i] for i in wanted] if isinstance(wanted, range) else self._drawn[wanted]
