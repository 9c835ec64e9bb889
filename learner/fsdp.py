"""FSDP2: shards of the model and of a step's micro-batches. A world of one rank has no shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tora.adapters.lora import LoRALinear
from tora.distributed.process_group import World
from tora.models.decoder import Decoder
from tora.types import MicroBatch


def sharder(
    world: World, device: torch.device, *, compute: torch.dtype, reshard_after_forward: bool, cpu_offload: bool
) -> Callable[[nn.Module], None]:
    """Shards in place what it is called with: each layer, then the model, whose embedding, final norm and head, and
    whatever else is no layer's, are a unit too.

    A unit that is trained whole holds float32 masters: its forward and backward run in `compute`, and its gradients are
    reduced in float32. So that one rank trains as several do, it shards such units too, and no others.
    Gradients are summed over ranks, since a token's weight in the loss already counts every rank's tokens.
    """
    if world.size == 1 and compute == torch.float32:
        return lambda unit: None
    mesh = init_device_mesh(device.type, (world.size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()

    cast = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def shard(unit: nn.Module) -> None:
        trains_whole = compute != torch.float32 and _trains_whole(unit)
        if world.size == 1 and not trains_whole:
            return
        module = fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=cast if trains_whole else MixedPrecisionPolicy(),
            offload_policy=offload,
        )
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    return shard


def _trains_whole(unit: nn.Module) -> bool:
    """Whether parameters outside adapters are trained here, those of units that are sharded already left out."""
    sharded = {id(p) for m in unit.modules() if isinstance(m, FSDPModule) for p in m.parameters()}
    adapters = {
        id(p)
        for m in unit.modules()
        if isinstance(m, LoRALinear)
        for n, p in m.named_parameters()
        if n in m.adapter_params()
    }
    return any(p.requires_grad and id(p) not in sharded | adapters for p in unit.parameters())


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
