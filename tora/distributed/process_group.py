"""The process group of a run, set up by the environment variables that torchrun sets. A world of one rank has no group.

Functions marked collective must be called by every rank.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
STORE_KEY = "TORA_STORE_KEY"
"""The environment variable with the secret of a run whose ranks Tora starts; ranks that torchrun starts have none."""
_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, as set by torchrun or by Tora; one rank if unset."""
        return cls(*(int(os.environ.get(name, default)) for name, default in _VARIABLES.items()))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of `items`, dealt round robin."""
        return items[self.rank :: self.size]

    def collect(self, own: Sequence[T]) -> list[T]:
        """The inverse of `share`: every rank's items, in the order before dealing. Collective."""
        if self.size == 1:
            return list(own)
        shares = gather_objects(list(own))
        longest = max(len(share) for share in shares)
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. Collective, and therefore a barrier."""
        return any(self.collect([flag]))


def join(world: World, device: torch.device, *, alone: bool = False) -> None:
    """Join the process group at MASTER_ADDR:MASTER_PORT, unless this process already has.

    A world of one rank has none; with `alone` it gets a group of its own, which opens no connection. A GPU `device`
    becomes the process's current one, in a world of one rank too.
    """
    if device.type == "cuda":
        # NCCL and FSDP2 use the current device, which is the first GPU until it is set
        torch.cuda.set_device(device)
    if dist.is_initialized() or (world.size == 1 and not alone):
        return
    options = group_options(device)
    if world.size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(**options, store=store, rank=0, world_size=1)
    elif STORE_KEY in os.environ:
        dist.init_process_group(**options, store=_private_store(world), rank=world.rank, world_size=world.size)
    else:
        dist.init_process_group(**options)


def _private_store(world: World) -> Any:
    """A store at MASTER_ADDR:MASTER_PORT that listens on that address alone, where torch's own listens on all, and
    keeps its keys under the run's secret."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = None
    if world.rank == 0:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((address, port), family=family).detach()
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address, port, world.size, is_master=world.rank == 0, wait_for_workers=False, master_listen_fd=listener
    )
    return dist.PrefixStore(os.environ[STORE_KEY], store)  # pyright: ignore[reportPrivateImportUsage]


def group_options(device: torch.device) -> dict[str, Any]:
    """Arguments of `init_process_group` for a rank on this device."""
    if device.type != "cuda":
        return {"backend": "gloo"}
    # gloo beside NCCL, for tensors offloaded to the CPU; device_id binds NCCL to this rank's GPU
    return {"backend": "cpu:gloo,cuda:nccl", "device_id": device}


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_rank(code: int) -> NoReturn:
    """Exit this process at once, without Python's shutdown; all its work must be done and written.

    During shutdown a rank on a busy machine occasionally aborts (`terminate called without an active exception`), and
    the run would count as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather_objects(own: T) -> list[T]:
    """Every rank's object, by rank. Collective."""
    if not dist.is_initialized():
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum of every rank's tensor, all of one shape and dtype, in a new tensor. Collective."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
