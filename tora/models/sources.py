"""Where in a folder's files the tensors of a model are, and whether they are those of its config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tora.errors import ConfigError
from tora.models.base import Decoder

HEAD = "lm_head.weight"
_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """One parameter's tensor in open files."""

    hf_name: str
    read: Callable[[], torch.Tensor]
    """May return memory of the mapped file."""
    rows: Any = None
    """The file's slice, where the tensor is stored as it is."""


def is_derived(hf_name: str, *, tied: bool) -> bool:
    """Whether a tensor, though stored in some folders, is computed from the rest of the model."""
    return hf_name.endswith("rotary_emb.inv_freq") or (tied and hf_name == HEAD)


def own_parameters(names: Iterable[str]) -> set[str]:
    """The parameters that a folder must hold: all but the adapters'."""
    return {name for name in names if ".lora_" not in name and not name.endswith(".magnitude")}


def check_shape(hf_name: str, shape: tuple[int, ...], parameter: torch.Tensor, folder: Path) -> None:
    """Raises ConfigError if a stored tensor has another shape than the model's."""
    if parameter.shape != shape:
        raise ConfigError(
            f"tensor {hf_name!r} of {str(folder)!r} has shape {shape}, config.json asks for {tuple(parameter.shape)}"
        )


def check_complete(model: Decoder, missing: set[str], folder: Path) -> None:
    """Raises ConfigError if any parameter is missing."""
    if missing:
        first = model.names.parameter_to_hf(sorted(missing)[0])
        raise ConfigError(f"{str(folder)!r} lacks {len(missing)} tensors of its model, e.g. {first!r}")


def check_tied(head: Any, embedding: Any, dtype: torch.dtype, folder: Path) -> None:
    """Raises ConfigError if the stored head of a tied model is not its embedding. Both are slices of open files."""
    if not _equal(head, embedding, dtype):
        raise ConfigError(
            f"config.json of {str(folder)!r} has tie_word_embeddings=true, and its files hold a {HEAD} that "
            "differs from the embedding; set it to false, so that every library uses that head"
        )


def _equal(a: Any, b: Any, dtype: torch.dtype) -> bool:
    """Whether two matrices in open files are equal once they are cast to `dtype`; reads some rows at a time."""
    if a.get_shape() != b.get_shape():
        return False
    starts = range(0, a.get_shape()[0], _ROWS)
    return all(torch.equal(*(m[row : row + _ROWS].to(dtype) for m in (a, b))) for row in starts)
