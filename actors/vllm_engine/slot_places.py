"""Where the modules of a snapshot go in vLLM 0.32: the layer, its packed part, and this rank's share of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actors.vllm_engine.dora_layers import GainLayer
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B
from tora.errors import SyncError

Tensors = Mapping[str, torch.Tensor]
"""One module's tensors, by their suffix in the wire format; see `tora.adapters.snapshot`."""


@dataclass(frozen=True)
class Place:
    """The place of a Hugging Face module in vLLM."""

    layer: str
    part: int
    """Position among the modules packed into that layer."""


def find_places(manager: Any, modules: Iterable[str]) -> dict[str, Place]:
    """The modules' places by Hugging Face name.

    Raises SyncError if a module has no LoRA layer in this engine, shares its place with another, or is in a layer that
    has other parts than modules.
    """
    places, rename = all_places(manager), renamer(manager.model)
    found: dict[str, Place] = {}
    for name in modules:
        place = places.get(rename(name))
        if place is None:
            raise SyncError(f"{name} matches no LoRA layer of the engine; its layers end in {_endings(places)}")
        if place in found.values():
            raise SyncError(f"{name} and another module of the snapshot map to the same layer of the engine")
        layer, packed = manager.modules[place.layer], len(manager.packed_modules.get(place.layer, [name]))
        if isinstance(layer, GainLayer) and layer.n_slices != packed:
            raise SyncError(f"{name} is one of {packed} modules in a layer of the engine with {layer.n_slices} parts")
        found[name] = place
    return found


def all_places(manager: Any) -> dict[str, Place]:
    """All places, by vLLM's name for the unpacked module."""
    return {
        module: Place(layer, part)
        for layer in manager.modules
        for part, module in enumerate(manager.packed_modules.get(layer, [layer]))
    }


def renamer(model: Any) -> Any:
    """Maps a Hugging Face module name to vLLM's, and to None if vLLM leaves the module out."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    renames = mapper.get_rename_mapper()  # without the rules that pack q, k and v into one name
    return lambda name: (renames.map_name(f"{name}.weight") or "").removesuffix(".weight") or None


def _endings(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def local_part(layer: Any, part: int, suffix: str, tensor: torch.Tensor) -> torch.Tensor:
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


def check_fits(name: str, tensors: Tensors, layer: Any, part: int) -> None:
    if not isinstance(layer, GainLayer) or part >= layer.n_slices:
        raise SyncError(f"the engine cannot serve an adapter on {name}, a {type(layer).__name__}")
    if GAIN in tensors and not layer.has_gains:
        raise SyncError(f"{name} has a gain, but the engine was started for plain LoRA, whose layers have none")
    rank_max = layer.lora_a_stacked[part].shape[2]
    size_in, size_out = _full_sizes(layer, part)
    rank = tensors[LORA_A].shape[0]
    if rank > rank_max:
        raise SyncError(f"{name} has rank {rank}, above the engine's {rank_max}")
    expected = {LORA_A: (rank, size_in), LORA_B: (size_out, rank), GAIN: (size_out,)}
    for suffix, tensor in tensors.items():
        if tuple(tensor.shape) != expected[suffix]:
            raise SyncError(f"{name}{suffix} has shape {tuple(tensor.shape)}, the engine's is {expected[suffix]}")
