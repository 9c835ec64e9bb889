"""Inside vLLM's worker: replaces the served weights by a snapshot of whole weights, through vLLM 0.32's reloading.

vLLM repacks weights for its kernels, so they cannot be read back: the digest covers what vLLM was handed, and the
canary checks that it serves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from actors.vllm_engine.slot_contents import SlotContents
from tora.adapters.snapshot import add_to_digest
from tora.errors import SyncError
from tora.models.family import families
from tora.models.load import read_config, shard_files
from tora.models.sources import is_derived


def replace_weights(worker: Any, tensors: Mapping[str, torch.Tensor]) -> SlotContents:
    """Loads the tensors one at a time, so that only one is copied at once.

    Raises SyncError, with nothing replaced, if the tensors are not those of the whole model. The vision tower's may be
    absent.
    """
    _check_complete(tensors, Path(worker.model_config.model))
    dtype, sha = worker.model_config.dtype, hashlib.sha256()

    def handed_over() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(tensors):
            tensor = tensors[name].to(dtype)
            add_to_digest(sha, name, tensor)
            yield name, tensor

    worker.reload_weights(weights_iterator=handed_over())
    if worker.device.type == "cpu":
        for module in worker.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):  # a tied head would keep the old embedding, repacked
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    modules = {name.rpartition(".")[0] for name in tensors}
    return SlotContents(sha.hexdigest(), str(dtype).removeprefix("torch."), len(modules))


def _check_complete(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Compares names and shapes with the folder that the engine was loaded from."""
    expected, tower = _expected(folder)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(name):
            raise SyncError(f"{name} of shape {tuple(tensor.shape)} is not a tensor of the engine's model")
    missing = sorted(expected.keys() - tensors.keys())
    if tower and not any(name.startswith(tower) for name in tensors):
        missing = [name for name in missing if not name.startswith(tower)]
    if missing:
        raise SyncError(f"the snapshot lacks {missing[0]}, a tensor of the engine's model")


@cache
def _expected(folder: Path) -> tuple[dict[str, tuple[int, ...]], str | None]:
    """Shapes by Hugging Face name, and the prefix of the vision tower's names. Cached because every sync needs them."""
    config, shapes = read_config(folder), {}
    for file in shard_files(folder):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                if not is_derived(name, tied=config.tie_word_embeddings):
                    shapes[name] = tuple(shard.get_slice(name).get_shape())
    return shapes, _tower(config)


def _tower(config: Any) -> str | None:
    family = families().get(config.model_type)
    return family.names.tower if family else None
