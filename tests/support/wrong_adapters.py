"""Engines that serve something else than the learner's adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tora.adapters.snapshot import GAIN, LORA_B, pack, unpack
from tora.protocols import Engine
from tora.types import PolicySnapshot, SyncReport

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], Mapping[str, torch.Tensor]]


def rescaled(tensors: Tensors) -> Tensors:
    """The scaling is off by a tenth."""
    return {name: t * 1.1 if name.endswith(LORA_B) else t for name, t in tensors.items()}


def without_gain(tensors: Tensors) -> Tensors:
    return {name: torch.ones_like(t) if name.endswith(GAIN) else t for name, t in tensors.items()}


def without_one_module(tensors: Tensors) -> Tensors:
    """One module of the first layer runs as its base."""

    def base(name: str, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t) if name.endswith(GAIN) else torch.zeros_like(t)

    return {name: base(name, t) if ".layers.0.mlp.down_proj" in name else t for name, t in tensors.items()}


class WrongEngine:
    """A real engine that is handed damaged snapshots."""

    def __init__(self, engine: Engine, damage: Damage) -> None:
        self._engine, self._damage = engine, damage

    def install(self, snapshot: PolicySnapshot) -> SyncReport:
        return self._engine.install(pack(snapshot.version, self._damage(unpack(snapshot))))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
