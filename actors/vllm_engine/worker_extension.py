"""Runs inside vLLM's worker: takes a policy snapshot into an adapter slot, in place, or refuses it whole.

vLLM imports this module, named as the engine's `worker_extension_cls`, before it builds the model; importing it
installs the layers with gains and the CPU kernel. The adapter never touches a disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actors.vllm_engine import adapter_slots, cpu_lora, dora_layers, policy_logprobs
from actors.vllm_engine.adapter_slots import Placed
from actors.vllm_engine.full_weights import replace_weights
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, digest, split_by_module, views
from tora.errors import SyncError
from tora.types import PolicySnapshot

dora_layers.install()
cpu_lora.install()
policy_logprobs.install()
# vLLM 0.32's bf16 CPU kernels use AMX tiles without asking Linux for them first, and die of SIGILL.
# Answers False on a CPU without AMX.
torch.cpu._init_amx()


@dataclass(frozen=True)
class SlotContents:
    """What an engine holds of a snapshot."""

    sha256: str
    """Over its tensors as they lie in the slot, or as whole weights were handed over, under their names on the wire;
    see `snapshot.digest`."""
    dtype: str
    """Of all but gains, which are float32."""
    num_modules: int


class SnapshotExtension:
    """vLLM mixes this into its Worker class: `self` is the worker.

    A sync is three calls, and the engine stands still for the second alone, which does nothing but copy.
    """

    model_runner: Any
    distributed_init_method: str

    def rendezvous_address(self) -> str:
        """The address by which vLLM's processes found one another."""
        return self.distributed_init_method

    def stage_snapshot(self, snapshot: PolicySnapshot) -> Placed:
        """Errors: SyncError unless every tensor arrived intact and has a place in the engine."""
        return adapter_slots.stage(self._manager, _modules(_receive(snapshot)))

    def write_snapshot(self, placed: Placed, adapter_id: int) -> None:
        """Afterwards requests with `adapter_id` run under this policy."""
        adapter_slots.write(self._manager, adapter_slots.slot_of(self._manager, adapter_id), placed)

    def read_snapshot(self, snapshot: PolicySnapshot, adapter_id: int) -> SlotContents:
        """Reads every tensor of the snapshot back. Errors: SyncError where the slot adapts more than the snapshot."""
        sent = split_by_module(views(snapshot))
        modules = adapter_slots.read(self._manager, adapter_slots.slot_of(self._manager, adapter_id), sent)
        names = {entry.name for entry in snapshot.entries}
        held = {
            name + suffix: tensor
            for name, tensors in modules.items()
            for suffix, tensor in tensors.items()
            # a gain that was not sent is left out only where it does nothing
            if name + suffix in names or suffix != GAIN or bool((tensor != 1).any())
        }
        dtype = next(tensor.dtype for name, tensor in held.items() if name.endswith(LORA_A))
        return SlotContents(digest(held), str(dtype).removeprefix("torch."), len(modules))

    def take_snapshot(self, snapshot: PolicySnapshot, adapter_id: int) -> SlotContents | str:
        """All three, for an engine whose workers are processes of their own: it answers what is wrong, because an
        error that leaves such a process ends the engine. Adapter id 0 stands for the weights themselves."""
        try:
            if adapter_id == 0:
                return SlotContents(*replace_weights(self, _receive(snapshot)))
            self.write_snapshot(self.stage_snapshot(snapshot), adapter_id)
            return self.read_snapshot(snapshot, adapter_id)
        except SyncError as error:
            return str(error)

    @property
    def _manager(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager


def _receive(snapshot: PolicySnapshot) -> dict[str, torch.Tensor]:
    """Only to be read. Errors: SyncError where names repeat, or the bytes are not those that were sent."""
    names = [entry.name for entry in snapshot.entries]
    if not names:
        raise SyncError(f"the snapshot of version {snapshot.version} is empty")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SyncError(f"the snapshot of version {snapshot.version} has {repeated[0]!r} twice")
    try:
        tensors = views(snapshot)
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
