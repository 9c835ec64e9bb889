"""Ranks: torchrun's contract, the process group, and FSDP2. A world of one rank has no process group and no shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from tora.models.decoder import Decoder
from tora.types import MicroBatch

T = TypeVar("T")
SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX


@dataclass(frozen=True, slots=True)
class World:
    """What torchrun, or a Ray launcher in its place, says in RANK, WORLD_SIZE and LOCAL_RANK."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        return cls(*(int(os.environ.get(name, default)) for name, default in _VARIABLES.items()))


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def join(world: World, device: torch.device) -> None:
    """Enter the process group that MASTER_ADDR and MASTER_PORT name, once in a process."""
    if world.size > 1 and not dist.is_initialized():
        # gloo beside NCCL, for what is offloaded to the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


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


def sharder(
    world: World, device: torch.device, *, reshard_after_forward: bool, cpu_offload: bool
) -> Callable[[nn.Module], None]:
    """Shards in place what it is called with: each layer, then the model, whose embedding, final norm and head, and
    whatever else is no layer's, are a unit too.

    Gradients are summed over ranks, since a token's weight in the loss already counts every rank's tokens.
    """
    if world.size == 1:
        return lambda unit: None
    mesh = init_device_mesh(device.type, (world.size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()

    def shard(unit: nn.Module) -> None:
        module = fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=offload)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    return shard


@contextmanager
def unsharded(model: Decoder, *, reshard_after_forward: bool) -> Iterator[None]:
    """Whole weights on every rank, gathered once, for as long as this lasts: ranks may then run apart.

    `reshard_after_forward` is what `sharder` was given, and what holds again afterwards.
    """
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(reshard_after_forward, recurse=False)
            module.reshard()


def share(micro_batches: Sequence[MicroBatch], rank: int, size: int) -> list[MicroBatch]:
    """A rank's part. All parts are as long, because every forward and backward is collective: where there are too few,
    a copy without weight fills up."""
    if not micro_batches:
        return []
    missing = -len(micro_batches) % size
    idle = replace(micro_batches[0], weights_N=micro_batches[0].weights_N * 0)
    return [*micro_batches, *[idle] * missing][rank::size]


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
