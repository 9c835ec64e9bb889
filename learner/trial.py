"""A random adapter for the proof at the start of a run: a new one has B = 0, and no engine could be told from its
base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from learner.fsdp import reshard
from tora.adapters.inject import refresh
from tora.distributed.sharding import local, local_rows
from tora.models.base import Decoder

_STD = 0.02


class Trial:
    """Noise on every B."""

    def __init__(self, model: Decoder, parameters: Mapping[str, nn.Parameter]) -> None:
        """`parameters`: the trained ones by name."""
        self._model = model
        self._live = {name: p for name, p in parameters.items() if name.endswith("lora_b")}
        self._kept: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def set(self, on: bool) -> None:
        """Add the noise, or restore every bit. Collective; each may be called twice."""
        if on == (self._kept is not None):
            return
        reshard(self._model)
        if self._kept is None:
            self._kept = {name: local(p.detach()).clone() for name, p in self._live.items()}
            generator = torch.Generator().manual_seed(0)
            for p in self._live.values():
                noise = _STD * torch.randn(p.shape, generator=generator)  # whole: each rank's rows have their own
                local(p).add_(local_rows(noise, p).to(local(p)))
        else:
            for name, rows in self._kept.items():
                local(self._live[name]).copy_(rows)
            self._kept = None
        refresh(self._model)
