"""The wire format: tensors <-> one flat buffer. Names are the Hugging Face model's module names with a suffix.

`<module>.lora_A.weight` [R, I]   `<module>.lora_B.weight` [O, R], scaling folded in   `<module>.gain` [O], DoRA only:
    y = gain ⊙ (W x + B A x) + bias
All float32. The gain is the learner's magnitude over its row norm, so the engine needs neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from tora.types import PolicySnapshot, TensorEntry

LORA_A, LORA_B, GAIN = ".lora_A.weight", ".lora_B.weight", ".gain"


def pack(version: int, tensors: Mapping[str, torch.Tensor]) -> PolicySnapshot:
    """Copies the tensors into a fresh buffer that nobody else holds."""
    entries: list[TensorEntry] = []
    offset = 0
    for name, tensor in tensors.items():
        entries.append(
            TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, tensor.nbytes)
        )
        offset += -(-tensor.nbytes // 16) * 16  # so that every tensor starts aligned
    data = torch.zeros(offset, dtype=torch.uint8)
    for entry, tensor in zip(entries, tensors.values(), strict=True):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data[entry.offset : entry.offset + entry.nbytes].copy_(flat)
    return PolicySnapshot(version, tuple(entries), data.numpy(), digest(tensors))


def unpack(snapshot: PolicySnapshot) -> dict[str, torch.Tensor]:
    """Views into a private copy: what arrives from Ray is read-only and shared, and vLLM scales in place."""
    data = torch.from_numpy(np.array(snapshot.data, copy=True))
    return {
        e.name: data[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).view(e.shape)
        for e in snapshot.entries
    }


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def held_digest(snapshot: PolicySnapshot, dtype: str) -> str:
    """The digest of an engine that holds every tensor in `dtype`, the gains excepted."""
    if dtype == "float32":
        return snapshot.sha256
    held = {n: t if n.endswith(GAIN) else t.to(getattr(torch, dtype)) for n, t in unpack(snapshot).items()}
    return digest(held)


def split_by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """`{module: {LORA_A: ..., LORA_B: ..., GAIN: ...}}`; a name without a known suffix is a ValueError."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in (LORA_A, LORA_B, GAIN) if name.endswith(s)), None)
        if suffix is None:
            raise ValueError(f"snapshot tensor {name!r} ends in none of {LORA_A}, {LORA_B}, {GAIN}")
        modules.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    return modules
