"""FSDP2: shards of the model and of a step's micro-batches. A world of one rank has no shards."""

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


def share_micro_batches(micro_batches: Sequence[MicroBatch], rank: int, size: int) -> list[MicroBatch]:
    """A rank's part. All parts are as long, because every forward and backward is collective: where there are too few,
    a copy without weight fills up."""
    if not micro_batches:
        return []
    missing = -len(micro_batches) % size
    idle = replace(micro_batches[0], weights_N=micro_batches[0].weights_N * 0)
    return [*micro_batches, *[idle] * missing][rank::size]
