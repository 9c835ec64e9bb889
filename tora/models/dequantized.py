"""The dequantised base of an NF4 policy, as a Hugging Face folder for an engine that loads its own weights.

vLLM does not support torchao's NF4, and bitsandbytes' NF4 rounds differently. The dequantised weights equal the
learner's bit for bit.
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

from tora.config.schema import Implementation
from tora.models.load import empty_decoder, shard_files, side_files, stream_tensors
from tora.models.quantize import BLOCK_SIZE, MAX_SCALER_BLOCK_SIZE, dequantize, quantize


def dequantized_folder(
    source: Path, cache: Path, *, dtype: torch.dtype, device: torch.device, implementation: Implementation = "auto"
) -> Path:
    """A folder in `cache` with the weights of `source` after a round trip through NF4; written if missing.

    It is as large as the model in `dtype`. Of several processes one writes, and the others wait for it. `device`
    quantises and must be of the learner's type: CPU and GPU sum in different orders.
    Raises ConfigError if a weight cannot be quantised to NF4.
    """
    final = cache / _key(source, dtype, device)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            temporary = cache / f".{final.name}"
            shutil.rmtree(temporary, ignore_errors=True)  # left by a process that died while writing
            temporary.mkdir()
            _write(source, temporary, dtype, device, implementation)
            temporary.rename(final)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an engine is about to measure free memory
    return final


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """Keep `cache` from being deleted by other processes on this file system; the last process to leave deletes it.

    A killed process leaves without deleting; another process that uses the folder, or the end of the run, deletes it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with suppress(BlockingIOError):  # still in use elsewhere
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(cache, ignore_errors=True)


def _key(source: Path, dtype: torch.dtype, device: torch.device) -> str:
    """A name that changes with the checkpoint's files and with how they are quantised."""
    stats = [(file.name, file.stat()) for file in [source / "config.json", *shard_files(source)]]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    parts = [str(source.resolve()), files, str(dtype), device.type, BLOCK_SIZE, MAX_SCALER_BLOCK_SIZE]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write(
    source: Path, target: Path, dtype: torch.dtype, device: torch.device, implementation: Implementation
) -> None:
    """Write the folder, with one weights file in memory and one tensor on the device at a time."""
    model = empty_decoder(source, dtype=dtype, device=torch.device("cpu"), implementation=implementation)
    quantized = {model.names.parameter_to_hf(name) for name in model.quantizable()}
    for file in side_files(source):
        shutil.copy(file, target)
    for file in shard_files(source):
        tensors = dict(stream_tensors(file))
        for name, tensor in tensors.items():
            if name in quantized:
                tensors[name] = dequantize(quantize(tensor.to(device, dtype), name)).cpu()
        save_file(tensors, target / file.name, metadata={"format": "pt"})
