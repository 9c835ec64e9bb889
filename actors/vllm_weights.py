"""Inside vLLM's worker: a snapshot of whole weights in place of those that it serves, by vLLM 0.32's own reloading.

vLLM keeps weights re-packed for its kernels, so they cannot be read back: the digest is of what it was handed. That it
serves them, the canary shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from tora.adapters.snapshot import add_to_digest, digest, views
from tora.errors import SyncError
from tora.models.family import families
from tora.models.load import read_config, shard_files
from tora.types import PolicySnapshot


def replace_weights(worker: Any, snapshot: PolicySnapshot) -> tuple[str, str, int]:
    """Answers the digest of the tensors that vLLM was handed, their dtype, and how many modules they belong to.

    One tensor at a time is in memory beside the snapshot. Errors: SyncError, with nothing replaced, unless the bytes
    are those that were sent, and the tensors all those of the model or all but the vision tower's.
    """
    tensors = views(snapshot)
    if digest(tensors) != snapshot.sha256:
        raise SyncError(f"the snapshot of version {snapshot.version} was damaged on its way: its sha256 differs")
    _check_complete(tensors, Path(worker.model_config.model))
    dtype, sha = worker.model_config.dtype, hashlib.sha256()

    def handed() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(tensors):
            tensor = tensors[name].to(dtype)
            add_to_digest(sha, name, tensor)
            yield name, tensor

    worker.reload_weights(weights_iterator=handed())
    if worker.device.type == "cpu":
        for module in worker.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):  # one that is tied keeps the old embedding, re-packed
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    modules = {name.rpartition(".")[0] for name in tensors}
    return sha.hexdigest(), str(dtype).removeprefix("torch."), len(modules)


def _check_complete(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Against the folder that the engine was loaded from."""
    config = read_config(folder)
    tower = families()[config.model_type].names.tower
    expected = {name: shape for file in shard_files(folder) for name, shape in _shapes(file).items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    expected = {name: shape for name, shape in expected.items() if not name.endswith("rotary_emb.inv_freq")}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(name):
            raise SyncError(f"{name} of shape {tuple(tensor.shape)} is no tensor of the engine's model")
    missing = sorted(expected.keys() - tensors.keys())
    if tower and not any(name.startswith(tower) for name in tensors):
        missing = [name for name in missing if not name.startswith(tower)]
    if missing:
        raise SyncError(f"the snapshot lacks {missing[0]} of the engine's model")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as shard:
        return {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
