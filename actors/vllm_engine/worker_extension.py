"""Runs inside vLLM's worker: installs a policy snapshot in place, completely or not at all, without going through disk.

vLLM imports this module, the engine's `worker_extension_cls`, before it builds the model. Importing it installs the
layers with gains and the CPU kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from actors.vllm_engine import adapter_slots, cpu_lora, dora_layers, gpu_lora, model_differences, policy_logprobs
from actors.vllm_engine.adapter_slots import Staged
from actors.vllm_engine.base_views import base_views
from actors.vllm_engine.full_weights import replace_weights
from actors.vllm_engine.slot_contents import Refusal, SlotContents
from actors.vllm_engine.streams import Streams, streams_for
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, digest, split_by_module, views
from tora.errors import SyncError
from tora.types import PolicySnapshot

dora_layers.install()
cpu_lora.install()
gpu_lora.install()
model_differences.install()
policy_logprobs.install()
# vLLM 0.32's bf16 CPU kernels use AMX tiles without requesting them from Linux first, and crash with SIGILL. On a CPU
# without AMX this only returns False.
torch.cpu._init_amx()


@dataclass(frozen=True, slots=True)
class _Sync:
    streams: Streams
    written: dict[int, Any] = field(default_factory=dict)
    """By adapter id, the event after which its slot holds its newest snapshot."""


class SnapshotExtension:
    """vLLM mixes this into its Worker class, so `self` is the worker.

    A sync is three calls: stage, write, read. Generation stalls only during the second, which only queues copies within
    the device. Engines whose workers are separate processes make them in one call, `install_adapter`.
    """

    model_runner: Any
    device: torch.device
    distributed_init_method: str

    def rendezvous_address(self) -> str:
        """Where vLLM's processes met to form their process group."""
        return self.distributed_init_method

    def base_weights(self, names: list[str]) -> dict[str, torch.Tensor]:
        """See `base_views`."""
        return base_views(self.model_runner.get_model(), names)

    def stage_snapshot(self, snapshot: PolicySnapshot) -> Staged:
        """Raises SyncError if a tensor is damaged or has no place in the engine."""
        return adapter_slots.stage(self._manager, snapshot, _modules(_receive(snapshot)), self._sync.streams)

    def write_snapshot(self, staged: Staged, adapter_id: int) -> None:
        """From the next step on requests with `adapter_id` run under this policy. Called between two steps, on the
        thread that queues them."""
        sync = self._sync
        sync.streams.wait(staged.ready)
        adapter_slots.write(self._manager, adapter_slots.slot_of(self._manager, adapter_id), staged.placed)
        sync.streams.keep(staged.buffer)
        sync.written[adapter_id] = sync.streams.record()

    def read_snapshot(self, snapshot: PolicySnapshot, adapter_id: int) -> SlotContents:
        """Reads every tensor back. Raises SyncError if the slot holds an adapter on a module that the snapshot
        lacks."""
        sent, sync = split_by_module(views(snapshot)), self._sync
        slot = adapter_slots.slot_of(self._manager, adapter_id)
        modules = adapter_slots.read(self._manager, slot, sent, sync.streams, sync.written[adapter_id])
        names = {entry.name for entry in snapshot.entries}
        held = {
            name + suffix: tensor
            for name, tensors in modules.items()
            for suffix, tensor in tensors.items()
            # a gain that was not sent is left out of the digest only if it is all ones
            if name + suffix in names or suffix != GAIN or bool((tensor != 1).any())
        }
        dtype = next(tensor.dtype for name, tensor in held.items() if name.endswith(LORA_A))
        return SlotContents(digest(held), str(dtype).removeprefix("torch."), len(modules))

    def install_adapter(self, snapshot: PolicySnapshot, adapter_id: int) -> SlotContents | Refusal:
        """Stage, write and read in one call."""
        try:
            self.write_snapshot(self.stage_snapshot(snapshot), adapter_id)
            return self.read_snapshot(snapshot, adapter_id)
        except SyncError as error:
            return Refusal(str(error))

    def install_weights(self, snapshot: PolicySnapshot) -> SlotContents | Refusal:
        """Replaces the model's own weights."""
        try:
            return replace_weights(self, _receive(snapshot))
        except SyncError as error:
            return Refusal(str(error))

    @property
    def _sync(self) -> _Sync:
        """Made at its first use, by whichever thread comes first: vLLM calls no initialiser of this class."""
        made = self.__dict__.get("_tora_sync")
        return made or self.__dict__.setdefault("_tora_sync", _Sync(streams_for(self.device)))

    @property
    def _manager(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager


def _receive(snapshot: PolicySnapshot) -> dict[str, torch.Tensor]:
    """Read-only views of the tensors. Raises SyncError if the snapshot is empty, repeats a name or is damaged."""
    names = [entry.name for entry in snapshot.entries]
    if not names:
        raise SyncError(f"the snapshot of version {snapshot.version} is empty")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SyncError(f"the snapshot of version {snapshot.version} has {repeated[0]!r} twice")
    try:
        tensors = views(snapshot)
    except (RuntimeError, AttributeError) as error:  # torch's errors for a short buffer or an unknown dtype
        raise SyncError(f"the snapshot of version {snapshot.version} cannot be read: {error}") from error
    if digest(tensors) != snapshot.sha256:
        raise SyncError(f"the snapshot of version {snapshot.version} was damaged in transit: its sha256 differs")
    return tensors


def _modules(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors by Hugging Face module name and suffix.

    Raises SyncError if a suffix is unknown, a module has half an adapter, or a tensor is not float32.
    """
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
                raise SyncError(f"{name}{suffix} is {tensor.dtype}; adapters must be sent in float32")
    return modules
