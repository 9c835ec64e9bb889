"""A mean of recent values."""

from __future__ import annotations


class RunningMean:
    """An exponential mean over roughly the last 32 values, starting from a guess."""

    _WEIGHT = 1 / 32

    def __init__(self, guess: float) -> None:
        self.mean = guess

    def add(self, value: float) -> None:
        self.mean += self._WEIGHT * (value - self.mean)
