"""A model family is data: what its config.json does not say about its decoder, and who builds the rest of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from tora.models.names import Names

_MODULES = ("qwen2_5", "qwen3", "llama3", "vision.qwen3_vl")


@dataclass(frozen=True, slots=True)
class ModelFamily:
    name: str
    model_type: str
    """`model_type` of config.json."""
    qk_norm: bool
    """RMS norm of every query and key head, before the rotation."""
    qkv_bias: bool | None
    """None: `attention_bias` of config.json."""
    output_bias: bool | None
    """Bias of the attention's output projection; None: `attention_bias` of config.json."""
    names: Names = field(default_factory=Names)
    build: Callable[..., Any] | None = None
    """Takes `build_decoder`'s arguments, for a family that is more than a decoder."""


def families() -> dict[str, ModelFamily]:
    """All families by `model_type`."""
    found = (import_module(f"tora.models.{name}").FAMILY for name in _MODULES)
    return {family.model_type: family for family in found}
