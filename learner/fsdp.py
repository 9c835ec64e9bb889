"""FSDP2: sharding of the model, and of a step's micro-batches, over ranks. A single rank shards nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import groupby

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tora.adapters.lora import LoRALinear
from tora.distributed.process_group import World
from tora.models.base import Decoder
from tora.types import MicroBatch


def sharder(
    world: World, device: torch.device, *, compute: torch.dtype, reshard_after_forward: bool, cpu_offload: bool
) -> Callable[[nn.Module], None]:
    """A function that shards a module in place. Call it with each layer and then with the model: the embedding, final
    norm, head and other parameters outside layers form the last unit.

    A unit with full-weight parameters holds them as float32 masters: its forward and backward pass run in `compute`,
    and its gradients are reduced in float32. A world of one rank shards such units too, and no others, so that it
    trains as several ranks do.
    Gradients are summed over ranks, not averaged: a token's weight in the loss already accounts for all ranks' tokens.
    """
    if world.size == 1 and compute == torch.float32:
        return lambda unit: None
    mesh = cache(partial(init_device_mesh, device.type, (world.size,)))  # one rank that shards nothing has no group
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()

    cast = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def shard(unit: nn.Module) -> None:
        trains_whole = compute != torch.float32 and _has_full_weight_parameters(unit)
        if world.size == 1 and not trains_whole:
            return
        module = fully_shard(
            unit,
            mesh=mesh(),
            reshard_after_forward=reshard_after_forward,
            mp_policy=cast if trains_whole else MixedPrecisionPolicy(),
            offload_policy=offload,
        )
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    return shard


def _has_full_weight_parameters(unit: nn.Module) -> bool:
    """Whether the unit trains parameters outside adapters, not counting units in it that are already sharded."""
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


def reshard(model: nn.Module) -> None:
    """Drop the full weights that FSDP2 may still hold after a forward pass, so that the next one gathers them anew.

    Call before and after changing sharded weights outside the optimizer.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shares(micro_batches: Sequence[MicroBatch], size: int) -> list[list[tuple[int, bool]]]:
    """What each rank runs: the index of each of its micro-batches, and whether it counts.

    Each mini-batch is dealt round robin. All ranks get equally many of it, because every forward and backward is
    collective: a rank that would have one fewer repeats the mini-batch's first, which does not count.
    """
    result: list[list[tuple[int, bool]]] = [[] for _ in range(size)]
    for _, members in groupby(range(len(micro_batches)), key=lambda i: micro_batches[i].mini_batch):
        indices = list(members)
        dealt = [(i, True) for i in indices] + [(indices[0], False)] * (-len(indices) % size)
        for rank in range(size):
            result[rank] += dealt[rank::size]
    return result


def share_micro_batches(micro_batches: Sequence[MicroBatch], rank: int, size: int) -> list[MicroBatch]:
    """A rank's micro-batches by `shares`. One that does not count has weights of zero."""
    return [
        micro_batches[i] if counts else replace(micro_batches[i], weights_N=micro_batches[i].weights_N * 0)
        for i, counts in shares(micro_batches, size)[rank]
    ]


def mini_batch_slices(share: Sequence[MicroBatch]) -> dict[int, slice]:
    """Where each mini-batch is in a rank's share, by its number."""
    bounds = [(n, [i for i, _ in members]) for n, members in groupby(enumerate(share), key=lambda m: m[1].mini_batch)]
    return {number: slice(indices[0], indices[-1] + 1) for number, indices in bounds}
