"""The snapshot format: named tensors <-> one flat buffer. Names are Hugging Face module names with a suffix:

- `<module>.lora_A.weight` [R, I] float32
- `<module>.lora_B.weight` [O, R] float32, scaling folded in
- `<module>.gain` [O] float32, DoRA only

so that y = gain ⊙ (W x + B A x) + bias. The gain is the learner's magnitude divided by its row norm, so the engine
needs neither. Full-weight parameters have their Hugging Face parameter names and their own dtype.

Shape letters: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from tora.types import PolicySnapshot, TensorEntry

LORA_A, LORA_B, GAIN = ".lora_A.weight", ".lora_B.weight", ".gain"
BUCKET_BYTES = 256 << 20
"""Upper bound on the tensors gathered at a time; a larger tensor is gathered alone."""


def pack(
    version: int,
    tensors: Mapping[str, torch.Tensor],
    gather: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] = dict,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> PolicySnapshot:
    """Copy the tensors into a new buffer, each aligned to 16 bytes.

    `gather` turns sharded tensors into full ones; it is called with one bucket at a time, to bound peak memory.
    `dtypes` names the tensors to convert and the dtype of each.
    """
    dtypes = dtypes or {}
    entries: list[TensorEntry] = []
    buckets: list[list[TensorEntry]] = [[]]
    offset = 0
    for name, tensor in tensors.items():
        dtype = dtypes.get(name, tensor.dtype)
        nbytes = tensor.shape.numel() * dtype.itemsize
        entry = TensorEntry(name, str(dtype).removeprefix("torch."), tuple(tensor.shape), offset, nbytes)
        if buckets[-1] and offset + nbytes > buckets[-1][0].offset + BUCKET_BYTES:
            buckets.append([])
        buckets[-1].append(entry)
        entries.append(entry)
        offset += -(-nbytes // 16) * 16  # aligned, so that each can be viewed in its dtype
    data = torch.zeros(offset, dtype=torch.uint8)
    for bucket in buckets:
        converted = {e.name: tensors[e.name].to(dtypes.get(e.name, tensors[e.name].dtype)) for e in bucket}
        full = gather(converted)
        for entry in bucket:
            flat = full[entry.name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            data[entry.offset : entry.offset + entry.nbytes].copy_(flat)
    return PolicySnapshot(version, tuple(entries), data.numpy(), digest(tensors_in(data, entries)))


def unpack(snapshot: PolicySnapshot) -> dict[str, torch.Tensor]:
    """The tensors, as views into a private copy: memory from Ray is read-only and shared, and vLLM scales in place."""
    return tensors_in(torch.from_numpy(np.array(snapshot.data, copy=True)), snapshot.entries)


def views(snapshot: PolicySnapshot) -> dict[str, torch.Tensor]:
    """The tensors, as views into the snapshot's own buffer. Read only: the memory may be shared."""
    return tensors_in(as_bytes(snapshot), snapshot.entries)


def as_bytes(snapshot: PolicySnapshot) -> torch.Tensor:
    """The snapshot's own buffer, [N] uint8. Read only: the memory may be shared."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(snapshot.data)


def tensors_in(data: torch.Tensor, entries: Iterable[TensorEntry]) -> dict[str, torch.Tensor]:
    """The entries' tensors, as views into a buffer of uint8 on any device."""
    return {e.name: data[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).view(e.shape) for e in entries}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, in the order of names; hexadecimal."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        add_to_digest(sha, name, tensors[name])
    return sha.hexdigest()


def add_to_digest(sha: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    """Add one tensor to a `digest`; call in the order of names."""
    tensor = tensor.detach().cpu().contiguous()
    sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def engine_digest(snapshot: PolicySnapshot, dtype: str) -> str:
    """The digest that an engine must report if it stores every tensor in `dtype`, and gains in float32."""
    if {e.dtype for e in snapshot.entries if not e.name.endswith(GAIN)} == {dtype}:
        return snapshot.sha256
    tensors, sha = views(snapshot), hashlib.sha256()
    for name in sorted(tensors):
        add_to_digest(sha, name, tensors[name] if name.endswith(GAIN) else tensors[name].to(getattr(torch, dtype)))
    return sha.hexdigest()


def split_by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """`{module: {LORA_A: ..., LORA_B: ..., GAIN: ...}}`. Raises ValueError if a name has no known suffix."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in (LORA_A, LORA_B, GAIN) if name.endswith(s)), None)
        if suffix is None:
            raise ValueError(f"snapshot tensor {name!r} ends in none of {LORA_A}, {LORA_B}, {GAIN}")
        modules.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    return modules
