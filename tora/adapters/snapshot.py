"""The wire format: tensors <-> one flat buffer. Names are the Hugging Face model's module names with a suffix.

`<module>.lora_A.weight` [R, I]   `<module>.lora_B.weight` [O, R], scaling folded in   `<module>.gain` [O], DoRA only:
    y = gain ⊙ (W x + B A x) + bias
All float32. The gain is the learner's magnitude over its row norm, so the engine needs neither. Parameters that are
trained whole travel under Hugging Face's names in their own dtype.
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
"""Of tensors that are made whole at a time; a larger one is a bucket of its own."""


def pack(
    version: int,
    tensors: Mapping[str, torch.Tensor],
    whole: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] = dict,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> PolicySnapshot:
    """Copies the tensors into a fresh buffer that nobody else holds.

    Bucket by bucket: `whole` answers some of the tensors as they are to be copied, where they are not here in full.
    `dtypes`: of tensors that travel in another dtype than they are held in.
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
        offset += -(-nbytes // 16) * 16  # so that every tensor starts aligned
    data = torch.zeros(offset, dtype=torch.uint8)
    for bucket in buckets:
        given = {entry.name: tensors[entry.name] for entry in bucket}
        filled = whole({name: t.to(dtypes.get(name, t.dtype)) for name, t in given.items()})
        for entry in bucket:
            flat = filled[entry.name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            data[entry.offset : entry.offset + entry.nbytes].copy_(flat)
    return PolicySnapshot(version, tuple(entries), data.numpy(), digest(_tensors(data, entries)))


def unpack(snapshot: PolicySnapshot) -> dict[str, torch.Tensor]:
    """Views into a private copy: what arrives from Ray is read-only and shared, and vLLM scales in place."""
    return _tensors(torch.from_numpy(np.array(snapshot.data, copy=True)), snapshot.entries)


def views(snapshot: PolicySnapshot) -> dict[str, torch.Tensor]:
    """Into the snapshot itself. Only to be read: the memory may be others' too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return _tensors(torch.from_numpy(snapshot.data), snapshot.entries)


def _tensors(data: torch.Tensor, entries: Iterable[TensorEntry]) -> dict[str, torch.Tensor]:
    return {e.name: data[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).view(e.shape) for e in entries}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        add_to_digest(sha, name, tensors[name])
    return sha.hexdigest()


def add_to_digest(sha: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    """One tensor of `digest`'s; call in the order of names."""
    tensor = tensor.detach().cpu().contiguous()
    sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def held_digest(snapshot: PolicySnapshot, dtype: str) -> str:
    """The digest of an engine that holds every tensor in `dtype`, the gains excepted."""
    if {e.dtype for e in snapshot.entries if not e.name.endswith(GAIN)} == {dtype}:
        return snapshot.sha256
    tensors, sha = views(snapshot), hashlib.sha256()
    for name in sorted(tensors):
        add_to_digest(sha, name, tensors[name] if name.endswith(GAIN) else tensors[name].to(getattr(torch, dtype)))
    return sha.hexdigest()


def split_by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """`{module: {LORA_A: ..., LORA_B: ..., GAIN: ...}}`; a name without a known suffix is a ValueError."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in (LORA_A, LORA_B, GAIN) if name.endswith(s)), None)
        if suffix is None:
            raise ValueError(f"snapshot tensor {name!r} ends in none of {LORA_A}, {LORA_B}, {GAIN}")
        modules.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    return modules
