"""Dropout of the adapters' inputs, in training passes alone.

The masks of a pass depend on the run's seed, the policy version and the pass's number among all ranks' passes of the
step, and on nothing else: a resumed run draws those of an unbroken one, and several ranks those of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch

from tora.distributed.process_group import World
from tora.models.base import Decoder

T = TypeVar("T")


class AdapterDropout:
    """Puts the model into training mode, with seeded random numbers, for the passes of a step."""

    def __init__(self, model: Decoder, rate: float, *, seed: int, world: World, device: torch.device) -> None:
        """`rate`: as in `model.lora_dropout`, with which the model's adapters were built."""
        self._model, self._rate, self._seed, self._world, self._device = model, rate, seed, world, device
        self.begin(0)

    @property
    def is_on(self) -> bool:
        return self._rate > 0

    def begin(self, version: int) -> None:
        """Begin the step that trains this policy version."""
        self._version, self._passes = version, 0

    def passes(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """The same items. While the caller has one, the model is in training mode: forward and backward belong there.

        The process's own random numbers are untouched afterwards.
        """
        if not self.is_on:
            yield from micro_batches
            return
        devices = [self._device] if self._device.type == "cuda" else []
        for item in micro_batches:
            with torch.random.fork_rng(devices):
                torch.manual_seed(self._next_seed())
                self._model.train()
                try:
                    yield item
                finally:
                    self._model.eval()

    def _next_seed(self) -> int:
        number = self._passes * self._world.size + self._world.rank
        self._passes += 1
        (seed,) = np.random.SeedSequence([self._seed, self._version, number]).generate_state(1, np.uint64)
        return int(seed)
