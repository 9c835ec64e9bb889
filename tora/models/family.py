"""Model families as data: what config.json leaves out about the decoder, and how to build anything beyond it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from tora.models.names import Names

_MODULES = ("qwen2_5", "qwen3", "llama3", "vision.qwen3_vl")


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One architecture; each family module has one as `FAMILY`."""

    name: str
    model_type: str
    """`model_type` in config.json."""
    qk_norm: bool
    """RMS norm on each query and key head, before the rotation."""
    qkv_bias: bool | None
    """Bias of the q, k and v projections; None means `attention_bias` in config.json."""
    output_bias: bool | None
    """Bias of the attention's output projection; None means `attention_bias` in config.json."""
    names: Names = field(default_factory=Names)
    build: Callable[..., Any] | None = None
    """Replaces `build_decoder`, with the same arguments, for a family with more than a decoder."""


def families() -> dict[str, ModelFamily]:
    """All families by `model_type`."""
    found = (import_module(f"tora.models.{name}").FAMILY for name in _MODULES)
    return {family.model_type: family for family in found}
