"""Peak memory of a function, on a GPU or of this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Peak memory during `work` minus memory before it, in bytes: allocated GPU memory, or resident memory on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _CLEAR.write_text("5")  # Linux: resets the recorded peak to the current size
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def peak_total(device: torch.device, prepare: Callable[[], T], work: Callable[[T], object]) -> tuple[int, T]:
    """Peak memory during `work`, minus memory before `prepare`, in bytes, and what `prepare` returned."""
    before = _held(device)
    made = prepare()
    added = _held(device) - before
    return added + peak_bytes(device, lambda: work(made)), made


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")
