"""What reward functions say beside their scores: TRL's `log_metric` and `log_extra`, and what they print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainerState:
    """The part of transformers' `TrainerState` that means the same here."""

    global_step: int = 0
    """Completed steps of the policy that wrote the completions."""
    max_steps: int = 0
    """`num_steps`."""


AT_START = TrainerState()


@dataclass(slots=True)
class Notes:
    """Of one call, or of all calls for a group."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    """By name, what was logged."""
    extras: dict[str, dict[int, Any]] = field(default_factory=dict)
    """By column, the value of each completion."""
    printed: list[str] = field(default_factory=list)
    """Lines."""

    def log_metric(self, name: str, value: float) -> None:
        """TRL's. Raises ValueError or TypeError if the value is no number."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def extra_of(self, count: int):
        """TRL's `log_extra` for a call with `count` completions."""

        def log_extra(column: str, values: Iterable[Any]) -> None:
            """Raises ValueError if there is not one value per completion."""
            found = list(values)
            if len(found) != count:
                raise ValueError(f"log_extra({column!r}) has {len(found)} values for {count} completions")
            self.extras.setdefault(str(column), {}).update(enumerate(map(_plain, found)))

        return log_extra

    def add(self, call: Notes, places: Sequence[int]) -> None:
        """Append those of a call for the completions at `places` of the group."""
        for name, values in call.metrics.items():
            self.metrics.setdefault(name, []).extend(values)
        for column, values in call.extras.items():
            self.extras.setdefault(column, {}).update({places[place]: value for place, value in values.items()})
        self.printed += call.printed

    def extras_at(self, place: int) -> dict[str, Any]:
        """The extra columns of one completion."""
        return {column: values[place] for column, values in self.extras.items() if place in values}


def _plain(value: Any) -> Any:
    """What JSON and Parquet can hold; anything else as text."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
