"""What a run needs on each kind of device that it uses, and whether that fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

GIB = 1 << 30
CUDA = round(0.75 * GIB)
"""A process's CUDA context, cuBLAS's workspaces and the like: an estimate."""
FRAGMENTS = 0.05
"""Of a step's memory on a GPU, what torch's allocator cannot use again: an estimate."""


@dataclass(frozen=True, slots=True)
class Place:
    """One device, or a machine's memory."""

    title: str
    parts: Counter[str]
    """Bytes by what they are for, in the order of the table."""
    capacity: int | None
    """None if it is not known."""
    on_gpu: bool

    @property
    def total(self) -> int:
        return self.parts.total()

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.total <= self.capacity

    def largest(self) -> list[str]:
        """The four largest parts that show in tenths of a GiB."""
        return [f"{name} {size / GIB:.1f}" for name, size in self.parts.most_common(4) if size >= GIB / 20]

    def sentence(self) -> str:
        needed = f"The {self.title} needs {gib(self.total)}"
        return needed if self.capacity is None else f"{needed} of {gib(self.capacity)}"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The memory of a whole run."""

    places: Sequence[Place]
    rollouts: int
    """Of the longest length, that one engine's key-value cache holds."""
    wanted: int
    """Rollouts that one engine has at once."""
    longest: int
    """Tokens of the longest sequence."""

    @property
    def cache_is_too_small(self) -> bool:
        return self.rollouts == 0

    @property
    def fits(self) -> bool:
        return not self.cache_is_too_small and all(place.fits for place in self.places)

    def why_not(self) -> str:
        """One clause for what does not fit; empty if all does."""
        for place in self.places:
            if not place.fits:
                largest = ", ".join(f"{name} {gib(size)}" for name, size in place.parts.most_common(3))
                return f"{place.sentence()}: {largest} and others"
        if self.cache_is_too_small:
            return f"The engine's key-value cache has no room for a sequence of {self.longest:,} tokens"
        return ""

    def line(self) -> str:
        """All of it in one line."""
        places = "; ".join(
            f"{place.title} {gib(place.total)}"
            + ("" if place.capacity is None else f" of {gib(place.capacity)}")
            + f" ({', '.join(place.largest())})"
            for place in self.places
        )
        return f"memory plan: {places}; cache for {self.rollouts:,} rollouts of {self.longest:,} tokens"


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
