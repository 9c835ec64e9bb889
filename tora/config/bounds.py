"""Bounds of a config's numbers, written beside the field: `Annotated[int, AtLeast(1)]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class AtLeast:
    value: float

    def holds(self, number: float) -> bool:
        return number >= self.value

    def __str__(self) -> str:
        return f"at least {self.value}"


@dataclass(frozen=True, slots=True)
class Above:
    value: float

    def holds(self, number: float) -> bool:
        return number > self.value

    def __str__(self) -> str:
        return f"greater than {self.value}"


@dataclass(frozen=True, slots=True)
class AtMost:
    value: float

    def holds(self, number: float) -> bool:
        return number <= self.value

    def __str__(self) -> str:
        return f"at most {self.value}"


@dataclass(frozen=True, slots=True)
class Below:
    value: float

    def holds(self, number: float) -> bool:
        return number < self.value

    def __str__(self) -> str:
        return f"less than {self.value}"


Bound = AtLeast | Above | AtMost | Below


@cache
def bounds_of(schema: type) -> dict[str, tuple[Bound, ...]]:
    """The bounds of each field of a dataclass; a field without any has an empty tuple."""
    return {name: tuple(_bounds_in(hint)) for name, hint in get_type_hints(schema, include_extras=True).items()}


def out_of_bounds(config: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for each number of a config dataclass, or of one nested in it, that breaks a bound. None passes.

    `prefix` is put before each key: empty, or a dotted path that ends in a dot.
    """
    bounds = bounds_of(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from out_of_bounds(value, f"{prefix}{field.name}.")
            continue
        for bound in bounds[field.name]:
            if value is not None and not bound.holds(value):
                yield f"{prefix}{field.name}={value} must be {bound}."


def _bounds_in(hint: Any) -> Iterator[Bound]:
    """Those of `Annotated[T, bound, ...]`, on its own or in a union such as `Annotated[T, bound] | None`."""
    if get_origin(hint) is Annotated:
        yield from (extra for extra in hint.__metadata__ if isinstance(extra, Bound))
    else:
        for part in get_args(hint):
            yield from _bounds_in(part)
