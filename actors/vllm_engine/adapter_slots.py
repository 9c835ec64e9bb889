"""vLLM 0.32's adapter slots: staging a snapshot on the device, writing it into a slot, and reading the slot back.

Each way the bytes cross between host and device by one copy of one flat buffer, on the sync's own stream. On the stream
of vLLM's steps a slot is written by copies within the device alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel

from actors.vllm_engine.dora_layers import GainLayer, gain_offset
from actors.vllm_engine.flat_buffer import copy_all, lay_out, view
from actors.vllm_engine.slot_places import Place, Tensors, all_places, check_fits, find_places, local_part
from actors.vllm_engine.streams import Streams
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, as_bytes, split_by_module, tensors_in
from tora.errors import SyncError
from tora.types import PolicySnapshot

_OFFSET = "offset"


@dataclass(frozen=True, slots=True)
class StagedLayer:
    """One vLLM layer's contents, exactly as its slot will hold them: views into the staged buffer."""

    parts: tuple[Tensors, ...]
    """A [R, I] and B [O, R] of each packed module, with vLLM's rank R; zero where the snapshot has less."""
    gain_O: torch.Tensor | None
    """Of all parts; None if the snapshot has no gain for the layer."""
    offset_O: torch.Tensor | None
    """(1 - gain) ⊙ bias; None without a gain or without a bias."""


Placed = dict[str, StagedLayer]
"""By vLLM's name of each layer that a snapshot touches."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A snapshot on the device, in the slots' dtype. The only rounding of A and B."""

    placed: Placed
    buffer: torch.Tensor
    """What the views of `placed` look into."""
    ready: Any
    """The event after which they hold their values."""


def stage(manager: Any, snapshot: PolicySnapshot, modules: Mapping[str, Tensors], streams: Streams) -> Staged:
    """Copy this rank's part of each tensor to the device and cast it there, on the sync's own stream.

    `modules`: the snapshot's tensors on the host. Returns once all is in place, so that a write waits for nothing.
    Raises SyncError as `find_places` does, and if a tensor does not fit.
    """
    places = find_places(manager, modules)
    for name, place in places.items():
        check_fits(name, modules[name], manager.modules[place.layer], place.part)
    layers = {place.layer: manager.modules[place.layer] for place in places.values()}
    with_gain = {place.layer for name, place in places.items() if GAIN in modules[name]}
    spans, nbytes = lay_out(_slot_tensors(layers, with_gain))
    with streams.own():
        sent = split_by_module(tensors_in(streams.upload(as_bytes(snapshot)), snapshot.entries))
        device = next(iter(layers.values())).lora_a_stacked[0].device
        buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        held = {key: view(buffer, span) for key, span in spans.items()}
        for layer in with_gain:
            held[layer, 0, GAIN].fill_(1)
        targets, sources = [], []
        for name, place in places.items():
            layer = layers[place.layer]
            for suffix, tensor in sent[name].items():
                source = local_part(layer, place.part, suffix, tensor)
                targets.append(_target(held, layer, place, suffix, source.shape))
                sources.append(source)
        copy_all(targets, sources)
        for name in with_gain:
            if (bias_O := layers[name].gained_bias_O) is not None:
                held[name, 0, _OFFSET].copy_(gain_offset(held[name, 0, GAIN], bias_O))
        ready = streams.record()
    streams.wait_on_host(ready)
    placed = {
        name: StagedLayer(
            tuple({s: held[name, part, s] for s in (LORA_A, LORA_B)} for part in range(layer.n_slices)),
            held.get((name, 0, GAIN)),
            held.get((name, 0, _OFFSET)),
        )
        for name, layer in layers.items()
    }
    return Staged(placed, buffer, ready)


_Key = tuple[str, int, str]
"""A layer, a part, and a suffix; gain and offset of all parts are under part 0."""


def _slot_tensors(
    layers: Mapping[str, Any], with_gain: set[str]
) -> Iterator[tuple[_Key, torch.dtype, tuple[int, ...]]]:
    """What a slot holds for each layer: keys, dtypes and shapes."""
    for name, layer in layers.items():
        for part in range(layer.n_slices):
            for suffix, stacked in ((LORA_A, layer.lora_a_stacked[part]), (LORA_B, layer.lora_b_stacked[part])):
                yield (name, part, suffix), stacked.dtype, tuple(stacked.shape[2:])
        if name in with_gain:
            yield (name, 0, GAIN), torch.float32, (sum(layer.part_sizes),)
            if layer.gained_bias_O is not None:
                yield (name, 0, _OFFSET), torch.float32, (sum(layer.part_sizes),)


def _target(
    held: Mapping[_Key, torch.Tensor], layer: GainLayer, place: Place, suffix: str, shape: torch.Size
) -> torch.Tensor:
    """Where a module's tensor goes: its first ranks, or its rows of the packed gain."""
    if suffix == GAIN:
        return layer.rows_of(held[place.layer, 0, GAIN], place.part)
    whole = held[place.layer, place.part, suffix]
    return whole[: shape[0]] if suffix == LORA_A else whole[:, : shape[1]]


def slot_of(manager: Any, adapter_id: int) -> int:
    """The slot of an adapter id. Registers an id at its first use, so that vLLM never looks for the adapter on disk."""
    if adapter_id not in manager.lora_index_to_id:
        manager._registered_adapters[adapter_id] = LoRAModel(adapter_id, manager.lora_config.max_lora_rank, {})
        manager.activate_adapter(adapter_id)
    return manager.lora_index_to_id.index(adapter_id)


def write(manager: Any, slot: int, placed: Placed) -> None:
    """Copies within the device, on the current stream. Modules absent from `placed` are reset to the base."""
    matrices: list[tuple[torch.Tensor, torch.Tensor]] = []
    gains: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, layer in manager.modules.items():
        staged = placed.get(name)
        if staged is None:
            layer.reset_lora(slot)
            continue
        for part, lora_a, lora_b in zip(staged.parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            matrices += [(lora_a[slot, 0], part[LORA_A]), (lora_b[slot, 0], part[LORA_B])]
        gains += layer.gain_copies(slot, staged.gain_O, staged.offset_O)
    for pairs in (matrices, gains):
        copy_all([target for target, _ in pairs], [source for _, source in pairs])


def read(
    manager: Any, slot: int, sent: Mapping[str, Tensors], streams: Streams, written: Any
) -> dict[str, dict[str, torch.Tensor]]:
    """The slot's tensors for each module in `sent`, on the CPU, by Hugging Face name and suffix. `written`: the event
    after which the slot holds them.

    Under tensor parallelism this rank's part is what its slot holds, and the rest is copied from `sent`. In layers with
    gains, a module without one reads back as a gain of ones. Raises SyncError if the slot holds an adapter on any other
    module.
    """
    places = find_places(manager, sent)
    others = [
        place
        for place in sorted(set(all_places(manager).values()) - set(places.values()), key=str)
        if isinstance(layer := manager.modules[place.layer], GainLayer) and place.part < layer.n_slices
    ]
    with streams.own():
        streams.wait(written)
        parts: dict[Any, torch.Tensor] = {
            (name, suffix): tensor
            for name, place in places.items()
            for suffix, tensor in _part(manager.modules[place.layer], slot, place.part, sent[name]).items()
        }
        parts |= {place: _is_adapted(manager.modules[place.layer], slot, place.part) for place in others}
        spans, nbytes = lay_out((key, tensor.dtype, tuple(tensor.shape)) for key, tensor in parts.items())
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=next(iter(parts.values())).device)
        copy_all([view(buffer, spans[key]) for key in parts], list(parts.values()))
        found = streams.download(buffer)
        done = streams.record()
    streams.wait_on_host(done)
    for place in others:
        if view(found, spans[place]):
            raise SyncError(f"the engine's {place.layer} is adapted, but the snapshot has no tensors for it")
    held: dict[str, dict[str, torch.Tensor]] = {name: {} for name in places}
    for key in parts:
        if not isinstance(key, Place):
            name, suffix = key
            held[name][suffix] = view(found, spans[key])
    for name, place in places.items():
        layer = manager.modules[place.layer]
        if layer.tp_size > 1:
            whole = {GAIN: torch.ones(sent[name][LORA_B].shape[0]), **sent[name]}
            held[name] = {s: _with_local_part(layer, place.part, s, whole[s], mine) for s, mine in held[name].items()}
    return held


def _part(layer: Any, slot: int, part: int, sent: Tensors) -> dict[str, torch.Tensor]:
    """Views of what the slot holds for one module."""
    rank = sent[LORA_A].shape[0]
    gain = {GAIN: layer.gain_part(slot, part)} if layer.has_gains else {}
    return {
        LORA_A: layer.lora_a_stacked[part][slot, 0, :rank],
        LORA_B: layer.lora_b_stacked[part][slot, 0, :, :rank],
        **gain,
    }


def _with_local_part(layer: Any, part: int, suffix: str, whole: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """`whole` in `mine`'s dtype, with this rank's part replaced by `mine`."""
    result = whole.to(mine.dtype).clone()
    where = local_part(layer, part, suffix, torch.arange(whole.numel()).view(whole.shape))
    result.view(-1)[where.reshape(-1)] = mine.reshape(-1)
    return result


def _is_adapted(layer: GainLayer, slot: int, part: int) -> torch.Tensor:
    """A bool on the device."""
    adapted = layer.lora_b_stacked[part][slot].any()
    return adapted | (layer.gain_part(slot, part) != 1).any() if layer.has_gains else adapted
