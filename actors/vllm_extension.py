"""Runs inside vLLM's worker: writes a policy snapshot into an adapter slot, in place, or refuses it whole.

vLLM imports this module, named as the engine's `worker_extension_cls`, before it builds the model; importing it
installs the layers with gains and the CPU kernel. The adapter never touches a disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel

from actors import vllm_cpu_lora, vllm_dora
from actors.vllm_dora import GainLayer
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, digest, split_by_module, unpack
from tora.errors import SyncError
from tora.types import PolicySnapshot, SyncReport

vllm_dora.install()
vllm_cpu_lora.install()
# vLLM 0.32's bf16 CPU kernels use AMX tiles without asking Linux for them first, and die of SIGILL.
# Answers False on a CPU without AMX.
torch.cpu._init_amx()

Tensors = Mapping[str, torch.Tensor]
"""One module's tensors, by suffix of the wire format."""


class SnapshotExtension:
    """vLLM mixes this into its Worker class: `self` is the worker."""

    model_runner: Any

    def load_policy_snapshot(self, snapshot: PolicySnapshot, adapter_id: int) -> SyncReport:
        """Afterwards requests with `adapter_id` run under this policy; modules absent from it run as the base.

        Errors: SyncError, with nothing written, unless every tensor arrived intact and has a place in the engine.
        """
        start = time.perf_counter()
        tensors = _receive(snapshot)
        manager = self.model_runner.lora_manager._adapter_manager
        placed = _place(manager, _modules(tensors))
        slot = _slot_of(manager, adapter_id)
        for name, layer in manager.modules.items():
            if name in placed:
                _write(layer, slot, placed[name])
            else:
                layer.reset_lora(slot)
        num_modules = sum(part is not None for parts in placed.values() for part in parts)
        seconds = time.perf_counter() - start
        return SyncReport(snapshot.version, snapshot.nbytes, seconds, snapshot.sha256, num_modules)


@dataclass(frozen=True)
class _Place:
    """Where a Hugging Face module lives in vLLM."""

    layer: str
    part: int
    """Position among the modules packed into that layer."""


def _receive(snapshot: PolicySnapshot) -> dict[str, torch.Tensor]:
    """Private memory. Errors: SyncError where names repeat, or the bytes are not those that were sent."""
    names = [entry.name for entry in snapshot.entries]
    if not names:
        raise SyncError(f"the snapshot of version {snapshot.version} is empty")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SyncError(f"the snapshot of version {snapshot.version} has {repeated[0]!r} twice")
    try:
        tensors = unpack(snapshot)
    except (RuntimeError, AttributeError) as error:  # what torch makes of a short buffer or an unknown dtype
        raise SyncError(f"the snapshot of version {snapshot.version} cannot be read: {error}") from error
    if digest(tensors) != snapshot.sha256:
        raise SyncError(f"the snapshot of version {snapshot.version} was damaged on its way: its sha256 differs")
    return tensors


def _modules(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """By Hugging Face module name. Errors: SyncError for an unknown suffix, half an adapter, or not float32."""
    try:
        modules = split_by_module(tensors)
    except ValueError as error:
        raise SyncError(str(error)) from error
    for name, parts in modules.items():
        missing = {LORA_A, LORA_B} - set(parts)
        if missing:
            raise SyncError(f"the snapshot has {name}{min(parts)} but no {name}{min(missing)}")
        for suffix, tensor in parts.items():
            if tensor.dtype != torch.float32:
                raise SyncError(f"{name}{suffix} is {tensor.dtype}; adapters travel in float32")
    return modules


def _place(manager: Any, modules: Mapping[str, Tensors]) -> dict[str, list[Tensors | None]]:
    """For each vLLM layer that the snapshot touches: the tensors of each module packed into it, None for an absent one.

    Errors: SyncError for a module that no LoRA layer of this engine holds, or that does not fit.
    """
    places = _places(manager)
    rename = _renamer(manager.model)
    placed: dict[str, list[Tensors | None]] = {}
    for name, tensors in modules.items():
        place = places.get(rename(name))
        if place is None:
            raise SyncError(f"{name} matches no LoRA layer of the engine; it has {_endings(places)}")
        layer = manager.modules[place.layer]
        _check_fits(name, tensors, layer, place.part)
        parts = placed.setdefault(place.layer, [None] * layer.n_slices)
        if parts[place.part] is not None:
            raise SyncError(f"{name} and another module of the snapshot are one and the same layer in the engine")
        parts[place.part] = tensors
    return placed


def _places(manager: Any) -> dict[str, _Place]:
    """By vLLM's name for the unpacked module."""
    return {
        module: _Place(layer, part)
        for layer in manager.modules
        for part, module in enumerate(manager.packed_modules.get(layer, [layer]))
    }


def _renamer(model: Any) -> Any:
    """Hugging Face's module name to vLLM's; None for one that vLLM leaves out."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    renames = mapper.get_rename_mapper()  # without the rules that pack q, k and v into one name
    return lambda name: (renames.map_name(f"{name}.weight") or "").removesuffix(".weight") or None


def _endings(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _check_fits(name: str, tensors: Tensors, layer: Any, part: int) -> None:
    if not isinstance(layer, GainLayer) or part >= layer.n_slices:
        raise SyncError(f"the engine cannot adapt {name}, a {type(layer).__name__}")
    rank_max, size_in = layer.lora_a_stacked[part].shape[2:]
    size_out = layer.part_sizes[part]
    rank = tensors[LORA_A].shape[0]
    if rank > rank_max:
        raise SyncError(f"{name} has rank {rank}, above the engine's {rank_max}")
    expected = {LORA_A: (rank, size_in), LORA_B: (size_out, rank), GAIN: (size_out,)}
    for suffix, tensor in tensors.items():
        if tuple(tensor.shape) != expected[suffix]:
            raise SyncError(f"{name}{suffix} has shape {tuple(tensor.shape)}, the engine's is {expected[suffix]}")


def _slot_of(manager: Any, adapter_id: int) -> int:
    """The slot of an adapter id, registered at its first use so that vLLM never looks for it on a disk."""
    if adapter_id not in manager.lora_index_to_id:
        manager._registered_adapters[adapter_id] = LoRAModel(adapter_id, manager.lora_config.max_lora_rank, {})
        manager.activate_adapter(adapter_id)
    return manager.lora_index_to_id.index(adapter_id)


def _write(layer: GainLayer, slot: int, parts: list[Tensors | None]) -> None:
    """A and B are cast to the engine's LoRA dtype here and nowhere else; the gain stays float32."""
    lora_a = [None if p is None else p[LORA_A] for p in parts]
    lora_b = [None if p is None else p[LORA_B] for p in parts]
    packed = len(parts) > 1
    # The annotations of vLLM 0.32 deny it, but a packed layer takes None for a part that is not adapted.
    layer.set_lora(slot, lora_a if packed else lora_a[0], lora_b if packed else lora_b[0])  # pyright: ignore[reportArgumentType]
    layer.set_gain(slot, [None if p is None else p.get(GAIN) for p in parts])
