"""The processes of one synchronous run, under torchrun: each generates its share, and all see the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Peers:
    """One process of `size`. Methods that say so are collective: every peer must call them."""

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.rank :: self.size]

    def join(self, mine: Sequence[T]) -> list[T]:
        """Everyone's shares in the order they were dealt. Collective."""
        if self.size == 1:
            return list(mine)
        shares: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(shares, list(mine))
        longest = max(len(share) for share in shares)
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def any(self, flag: bool) -> bool:
        """Whether it is true for anyone. Collective."""
        return any(self.join([flag]))
