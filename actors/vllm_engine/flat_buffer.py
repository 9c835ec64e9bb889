"""Many tensors in one flat buffer of bytes, so that one copy moves them all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key")
_ALIGNMENT = 16
"""Bytes; the widest load of a GPU, and a multiple of every dtype's size."""


@dataclass(frozen=True, slots=True)
class Span:
    """The place of one tensor."""

    offset: int
    """In bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def lay_out(tensors: Iterable[tuple[Key, torch.dtype, tuple[int, ...]]]) -> tuple[dict[Key, Span], int]:
    """The tensors' spans, in order and apart from each other, and the size of the buffer in bytes."""
    spans: dict[Key, Span] = {}
    offset = 0
    for key, dtype, shape in tensors:
        assert key not in spans, f"{key} is laid out twice"
        spans[key] = Span(offset, dtype, tuple(shape))
        offset += -(-spans[key].nbytes // _ALIGNMENT) * _ALIGNMENT
    return spans, offset


def view(buffer: torch.Tensor, span: Span) -> torch.Tensor:
    """The tensor of a span, as a view into a buffer of uint8."""
    return buffer[span.offset : span.offset + span.nbytes].view(span.dtype).view(span.shape)


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Each source into its target, of the same shape. A GPU copies contiguous ones of one dtype by few kernels."""
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
