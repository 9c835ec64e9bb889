"""The answers of vLLM's workers to a snapshot. Imports neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tora.errors import SyncError


@dataclass(frozen=True, slots=True)
class SlotContents:
    """What a worker holds of a snapshot."""

    sha256: str
    """`snapshot.digest` of the tensors as read back from the adapter slot, or as handed to vLLM for whole weights."""
    dtype: str
    """torch's name for the dtype of every tensor except gains, which are float32."""
    num_modules: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a worker installed nothing. An exception raised in a worker process would end vLLM."""

    reason: str


def consensus(answers: Sequence[SlotContents | Refusal]) -> SlotContents:
    """What all tensor-parallel ranks hold. Raises SyncError if one refused or if they differ."""
    contents: list[SlotContents] = []
    for answer in answers:
        if isinstance(answer, Refusal):
            raise SyncError(answer.reason)
        contents.append(answer)
    for other in contents[1:]:
        if other != contents[0]:
            raise SyncError(f"tensor-parallel ranks hold different policies: {contents[0]} and {other}")
    return contents[0]
