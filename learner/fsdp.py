"""FSDP2: sharding of the model, and of a step's micro-batches, over ranks. A single rank shards nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from tora.distributed.process_group import World
from tora.models.decoder import Decoder
from tora.types import MicroBatch


def sharder(
    world: World, device: torch.device, *, reshard_after_forward: bool, cpu_offload: bool
) -> Callable[[nn.Module], None]:
    """A function that shards a module in place. Call it with each layer and then with the model: the embedding, final
    norm, head and other parameters outside layers form the last unit.

    Gradients are summed over ranks, not averaged: a token's weight in the loss already accounts for all ranks' tokens.
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
    """Hold the full weights on every rank, gathered once, so that ranks can run the model independently meanwhile.

    `reshard_after_forward` is the value that `sharder` was given; it is restored on exit.
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


def share_micro_batches(micro_batches: Sequence[MicroBatch], rank: int, size: int) -> list[MicroBatch]:
    """A rank's share, dealt round robin. All shares are equally long, because every forward and backward is collective:
    a rank that would have one fewer gets a copy of the first micro-batch, with weights of zero."""
    if not micro_batches:
        return []
    missing = -len(micro_batches) % size
    idle = replace(micro_batches[0], weights_N=micro_batches[0].weights_N * 0)
    return [*micro_batches, *[idle] * missing][rank::size]
