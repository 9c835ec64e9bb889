"""Safetensors files as people have them: cut off, empty, or a pointer that Git LFS left in place of the file."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tora.errors import ConfigError, first_line

_POINTER = b"version https://git-lfs.github.com/spec"


@contextmanager
def open_weights(file: Path):
    """A safetensors handle. Raises ConfigError if the file is missing or no whole safetensors file, with the remedy."""
    from safetensors import SafetensorError, safe_open

    try:
        handle: Any = safe_open(file, framework="pt")
        handle.__enter__()
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(_damage(file, error)) from error
    try:
        yield handle
    finally:
        handle.__exit__(None, None, None)


def _damage(file: Path, error: Exception) -> str:
    if not file.is_file():
        return f"{str(file)!r} is missing, and the model's index names it; download it"
    with file.open("rb") as head:
        start = head.read(len(_POINTER))
    if start == _POINTER:
        return f"{str(file)!r} is a pointer of Git LFS, not the file itself; `git lfs pull` fetches it"
    if not start:
        return f"{str(file)!r} is empty; download it again"
    return f"{str(file)!r} is no whole safetensors file: {first_line(error)}; download it again"
