"""The base that a quantised policy computes with, as a Hugging Face folder for an engine that loads one itself.

vLLM has none of torchao's NF4, and another NF4 (bitsandbytes') rounds elsewhere; the dequantised weights are the
learner's to the bit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from tora.models.family import families
from tora.models.load import read_config, shard_files, side_files, stream_tensors
from tora.models.quantize import BLOCK_SIZE, MAX_SCALER_BLOCK_SIZE, dequantize, is_quantized, quantize


def dequantized_folder(source: Path, cache: Path, *, dtype: torch.dtype, device: torch.device) -> Path:
    """A folder in `cache` with what the weights of `source` are once they have been NF4; written where it is missing.

    As big as the model at `dtype`. Processes that ask at once wait for the one that writes. `device` quantises, and
    should be of the learner's kind: CPU and GPU add up in different orders.
    Errors: ConfigError for a weight that cannot be NF4.
    """
    final = cache / _key(source, dtype, device)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            aside = cache / f".{final.name}"
            shutil.rmtree(aside, ignore_errors=True)  # left by a process that died while writing
            aside.mkdir()
            _write(source, aside, dtype, device)
            aside.rename(final)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an engine is about to measure what is free
    return final


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """While this lasts, others on this file system leave `cache` alone; the last one out deletes it.

    A process that is killed is out too, and deletes nothing: another one that uses the folder will, or the run's end.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with suppress(BlockingIOError):  # there are others
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(cache, ignore_errors=True)


def _key(source: Path, dtype: torch.dtype, device: torch.device) -> str:
    """Changes with the checkpoint's files and with how they are quantised."""
    stats = [(file.name, file.stat()) for file in [source / "config.json", *shard_files(source)]]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    parts = [str(source.resolve()), files, str(dtype), device.type, BLOCK_SIZE, MAX_SCALER_BLOCK_SIZE]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write(source: Path, target: Path, dtype: torch.dtype, device: torch.device) -> None:
    """One weights file in memory at a time, one tensor on the device."""
    names = families()[read_config(source).model_type].names
    for file in side_files(source):
        shutil.copy(file, target)
    for file in shard_files(source):
        tensors = dict(stream_tensors(file))
        for name, tensor in tensors.items():
            if is_quantized(names.parameter_from_hf(name) or ""):
                tensors[name] = dequantize(quantize(tensor.to(device, dtype), name)).cpu()
        save_file(tensors, target / file.name, metadata={"format": "pt"})
