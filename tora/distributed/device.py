"""The device of a process. A GPU that PyTorch cannot use is an error, never a silent run on the CPU."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import torch

from tora.errors import ConfigError

DRIVER = 580
"""The oldest NVIDIA driver for the CUDA 13 that PyTorch's wheels are built for."""
_STATM = Path("/proc/self/statm")


def device_for(kind: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """`auto` is the GPU if there is one, otherwise the CPU.

    Raises ConfigError if a GPU is asked for, or there is one, and PyTorch cannot use it.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"A learner rank needs a GPU of its own: this machine has {count}, for at least {local_rank + 1} "
                "ranks. Lower --nproc_per_node or learner_ranks."
            )
        return torch.device("cuda", local_rank)
    if gpus := visible_gpus():
        raise ConfigError(
            f"This machine has {len(gpus)} NVIDIA GPU{'s' if len(gpus) > 1 else ''}, but PyTorch cannot use "
            f"{'them' if len(gpus) > 1 else 'it'}: {_reason()} To train on the CPU all the same, set device=cpu."
        )
    if kind == "cuda":
        raise ConfigError("device=cuda, but this process sees no NVIDIA GPU; device=auto falls back to the CPU.")
    return torch.device("cpu")


def visible_gpus(dev: Path = Path("/dev")) -> list[Path]:
    """Device files of the NVIDIA GPUs that this process may use, whether or not PyTorch can; none if
    CUDA_VISIBLE_DEVICES hides all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    return sorted(dev.glob("nvidia[0-9]*"))


def machine_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes of a GPU's memory, or for a CPU of the machine's, or of what its container may use; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [_number(root / "proc" / "meminfo", r"MemTotal:\s+(\d+) kB", 1024)]
    found.append(_number(root / "sys" / "fs" / "cgroup" / "memory.max", r"(\d+)", 1))
    return min((size for size in found if size is not None), default=None)


def _number(file: Path, pattern: str, unit: int) -> int | None:
    found = re.search(pattern, file.read_text()) if file.is_file() else None
    return int(found[1]) * unit if found else None


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the loaded NVIDIA driver, such as 580.65.06; None if none is loaded."""
    found = re.search(r"Kernel Module\b.*?\s(\d{3}\.\d+(\.\d+)?)\s", file.read_text()) if file.is_file() else None
    return found[1] if found else None


def _reason() -> str:
    if torch.version.cuda is None:
        return (
            "this PyTorch is a CPU build. Reinstall with ./deploy/setup.sh, or pip install -e '.[async_rl]' in a new "
            "environment."
        )
    installed = driver_version()
    return (
        f"it is built for CUDA {torch.version.cuda}, which needs an NVIDIA driver of version {DRIVER} or later, and "
        f"{f'{installed} is installed' if installed else 'none is loaded'}."
    )


def memory_gib(device: torch.device) -> float:
    """The most that PyTorch has allocated on this GPU so far, or what this process holds on a CPU; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        pages = int(_STATM.read_text().split()[1])
    except OSError:  # no Linux
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
