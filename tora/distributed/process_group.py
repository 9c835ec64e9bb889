"""The process group of a run, by torchrun's contract. A world of one rank has none.

Functions that say so are collective: every rank must call them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX
_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """As torchrun sets RANK, WORLD_SIZE and LOCAL_RANK, or a Ray launcher in its place."""
        return cls(*(int(os.environ.get(name, default)) for name, default in _VARIABLES.items()))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of `items`, dealt round robin."""
        return items[self.rank :: self.size]

    def collect(self, mine: Sequence[T]) -> list[T]:
        """Every rank's share, in the order in which `share` dealt them. Collective."""
        if self.size == 1:
            return list(mine)
        shares = gather_objects(list(mine))
        longest = max(len(share) for share in shares)
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return any(self.collect([flag]))


def join(world: World, device: torch.device, *, alone: bool = False) -> None:
    """Enter the process group that MASTER_ADDR and MASTER_PORT name, once in a process.

    A world of one rank needs none; with `alone` it gets one of itself, which touches no network.
    """
    if dist.is_initialized() or (world.size == 1 and not alone):
        return
    # gloo beside NCCL, for what is offloaded to the CPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end_rank(code: int) -> NoReturn:
    """End this process, whose work is done and written, without Python's own clearing up.

    There a rank on a busy machine now and then aborts (`terminate called without an active exception`), and torchrun
    would take the run for failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather_objects(own: T) -> list[T]:
    """Every rank's, in the order of ranks."""
    if not dist.is_initialized():
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def reduce(values: Mapping[str, float], how: dist.ReduceOp.RedOpType, device: torch.device) -> dict[str, float]:
    """Each value over all ranks, which must call with the same names."""
    if not dist.is_initialized():
        return dict(values)
    together = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(together, how)
    return dict(zip(values, together.tolist(), strict=True))
