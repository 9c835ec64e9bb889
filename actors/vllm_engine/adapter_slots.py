"""vLLM 0.32's adapter slots: where a snapshot's tensors go, writing them, and reading them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel

from actors.vllm_engine.dora_layers import GainLayer
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B
from tora.errors import SyncError

Tensors = Mapping[str, torch.Tensor]
"""One module's tensors, by their suffix in the wire format; see `tora.adapters.snapshot`."""
Placed = dict[str, list[Tensors | None]]
"""For each vLLM layer that a snapshot touches: the tensors of each module packed into it, None where absent."""


@dataclass(frozen=True)
class Place:
    """The place of a Hugging Face module in vLLM."""

    layer: str
    part: int
    """Position among the modules packed into that layer."""


def find_places(manager: Any, modules: Iterable[str]) -> dict[str, Place]:
    """The modules' places by Hugging Face name.

    Raises SyncError if a module has no LoRA layer in this engine, or shares its place with another.
    """
    places, rename = _places(manager), _renamer(manager.model)
    found: dict[str, Place] = {}
    for name in modules:
        place = places.get(rename(name))
        if place is None:
            raise SyncError(f"{name} matches no LoRA layer of the engine; its layers end in {_endings(places)}")
        if place in found.values():
            raise SyncError(f"{name} and another module of the snapshot map to the same layer of the engine")
        found[name] = place
    return found


def _places(manager: Any) -> dict[str, Place]:
    """All places, by vLLM's name for the unpacked module."""
    return {
        module: Place(layer, part)
        for layer in manager.modules
        for part, module in enumerate(manager.packed_modules.get(layer, [layer]))
    }


def _renamer(model: Any) -> Any:
    """Maps a Hugging Face module name to vLLM's, and to None if vLLM leaves the module out."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    renames = mapper.get_rename_mapper()  # without the rules that pack q, k and v into one name
    return lambda name: (renames.map_name(f"{name}.weight") or "").removesuffix(".weight") or None


def _endings(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def stage(manager: Any, modules: Mapping[str, Tensors]) -> Placed:
    """This rank's part of each tensor, by place, in the slots' dtype and on their device. The only rounding of A and B.

    Raises SyncError as `find_places` does, and if a tensor does not fit.
    """
    placed: Placed = {}
    for name, place in find_places(manager, modules).items():
        layer = manager.modules[place.layer]
        _check_fits(name, modules[name], layer, place.part)
        slots = layer.lora_a_stacked[place.part]
        parts = placed.setdefault(place.layer, [None] * layer.n_slices)
        parts[place.part] = {
            suffix: _local_part(layer, place.part, suffix, tensor).to(
                slots.device, torch.float32 if suffix == GAIN else slots.dtype
            )
            for suffix, tensor in modules[name].items()
        }
    return placed


def _local_part(layer: Any, part: int, suffix: str, tensor: torch.Tensor) -> torch.Tensor:
    """This tensor-parallel rank's part of a module's A [R, I], B [O, R] or gain [O], sliced as vLLM slices A and B."""
    if layer.tp_size == 1:
        return tensor
    cut = layer.slice_lora_a if suffix == LORA_A else layer.slice_lora_b
    matrix = tensor[:, None] if suffix == GAIN else tensor
    if layer.n_slices == 1:
        matrix = cut(matrix)
    else:
        matrix = cut([matrix if i == part else None for i in range(layer.n_slices)])[part]
    return matrix[:, 0] if suffix == GAIN else matrix


def _full_sizes(layer: Any, part: int) -> tuple[int, int]:
    """Inputs and outputs of a whole module, over all tensor-parallel ranks."""
    base = layer.base_layer
    if layer.tp_size == 1:
        return layer.lora_a_stacked[part].shape[3], layer.part_sizes[part]
    if layer.n_slices == 1:
        return base.input_size, base.output_size
    if hasattr(base, "total_num_kv_heads"):  # `output_sizes` counts replicated heads once per rank
        return base.input_size, base.head_size * (base.total_num_kv_heads if part else base.total_num_heads)
    return base.input_size, base.output_sizes[part]


def _check_fits(name: str, tensors: Tensors, layer: Any, part: int) -> None:
    if not isinstance(layer, GainLayer) or part >= layer.n_slices:
        raise SyncError(f"the engine cannot serve an adapter on {name}, a {type(layer).__name__}")
    rank_max = layer.lora_a_stacked[part].shape[2]
    size_in, size_out = _full_sizes(layer, part)
    rank = tensors[LORA_A].shape[0]
    if rank > rank_max:
        raise SyncError(f"{name} has rank {rank}, above the engine's {rank_max}")
    expected = {LORA_A: (rank, size_in), LORA_B: (size_out, rank), GAIN: (size_out,)}
    for suffix, tensor in tensors.items():
        if tuple(tensor.shape) != expected[suffix]:
            raise SyncError(f"{name}{suffix} has shape {tuple(tensor.shape)}, the engine's is {expected[suffix]}")


def slot_of(manager: Any, adapter_id: int) -> int:
    """The slot of an adapter id. Registers an id at its first use, so that vLLM never looks for the adapter on disk."""
    if adapter_id not in manager.lora_index_to_id:
        manager._registered_adapters[adapter_id] = LoRAModel(adapter_id, manager.lora_config.max_lora_rank, {})
        manager.activate_adapter(adapter_id)
    return manager.lora_index_to_id.index(adapter_id)


def write(manager: Any, slot: int, placed: Placed) -> None:
    """Modules absent from `placed` are reset to the base.

    vLLM's own `set_lora` clears a slot before filling it, which takes twice as long.
    """
    for name, layer in manager.modules.items():
        parts = placed.get(name)
        if parts is None:
            layer.reset_lora(slot)
            continue
        for part, lora_a, lora_b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            _fill(lora_a[slot, 0], None if part is None else part[LORA_A], dim=0)
            _fill(lora_b[slot, 0], None if part is None else part[LORA_B], dim=1)
        layer.set_gain(slot, [None if p is None else p.get(GAIN) for p in parts])


def _fill(place: torch.Tensor, tensor: torch.Tensor | None, *, dim: int) -> None:
    """Copy the tensor, and zero the slot's remaining ranks along `dim`."""
    rank = 0 if tensor is None else tensor.shape[dim]
    if tensor is not None:
        place.narrow(dim, 0, rank).copy_(tensor, non_blocking=True)
    if rank < place.shape[dim]:
        place.narrow(dim, rank, place.shape[dim] - rank).zero_()


def read(manager: Any, slot: int, sent: Mapping[str, Tensors]) -> dict[str, dict[str, torch.Tensor]]:
    """The slot's tensors for each module in `sent`, on the CPU, by Hugging Face name and suffix.

    Under tensor parallelism this rank's part is what its slot holds, and the rest is copied from `sent`. A module
    without a gain reads back as a gain of ones. Raises SyncError if the slot holds an adapter on any other module.
    """
    places = find_places(manager, sent)
    for place in set(_places(manager).values()) - set(places.values()):
        layer = manager.modules[place.layer]
        if isinstance(layer, GainLayer) and place.part < layer.n_slices and not _is_base(layer, slot, place.part):
            raise SyncError(f"the engine's {place.layer} is adapted, but the snapshot has no tensors for it")
    held = {}
    for name, place in places.items():
        layer, rank = manager.modules[place.layer], sent[name][LORA_A].shape[0]
        held[name] = {
            LORA_A: layer.lora_a_stacked[place.part][slot, 0, :rank].cpu(),
            LORA_B: layer.lora_b_stacked[place.part][slot, 0, :, :rank].cpu(),
            GAIN: layer.gain_part(slot, place.part).cpu(),
        }
        if layer.tp_size > 1:
            ones = {GAIN: torch.ones(sent[name][LORA_B].shape[0])}
            whole = {**ones, **sent[name]}
            held[name] = {s: _with_local_part(layer, place.part, s, whole[s], mine) for s, mine in held[name].items()}
    return held


def _with_local_part(layer: Any, part: int, suffix: str, whole: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """`whole` in `mine`'s dtype, with this rank's part replaced by `mine`."""
    result = whole.to(mine.dtype).clone()
    where = _local_part(layer, part, suffix, torch.arange(whole.numel()).view(whole.shape))
    result.view(-1)[where.reshape(-1)] = mine.reshape(-1)
    return result


def _is_base(layer: GainLayer, slot: int, part: int) -> bool:
    return not layer.lora_b_stacked[part][slot].any() and bool((layer.gain_part(slot, part) == 1).all())
