"""`environment_factory`: one environment, or several by name, of which each row of the dataset chooses one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tora.config.convert import show
from tora.config.schema import Component
from tora.errors import ConfigError, nearest

COLUMN = "environment"
"""The dataset's column that names a row's environment, as in TRL. `reset` does not get it."""


def by_name(factory: Component | None) -> dict[str, Component]:
    """The environments of `environment_factory` by their names; that of a config with one is called "".

    Raises ConfigError if there is neither.
    """
    if factory is None:
        return {}
    if "_component_" in factory:
        return {"": factory}
    for name, component in factory.items():
        if not isinstance(component, dict) or "_component_" not in component:
            raise ConfigError(
                f"environment_factory.{name}={show(component)} must hold _component_ and its arguments: "
                "environment_factory is one component, or several by name."
            )
    if not factory:
        raise ConfigError("environment_factory={} must hold _component_, or components by name.")
    return dict(factory)


def key_of(name: str) -> str:
    """The config's key of an environment."""
    return f"environment_factory.{name}" if name else "environment_factory"


def chosen(columns: Mapping[str, Any], names: Iterable[str]) -> str:
    """The name of a row's environment. Raises ConfigError if it is none of `names`."""
    names = [*names]
    if names == [""]:
        return ""
    name = columns.get(COLUMN)
    if name not in names:
        known = ", ".join(names)
        if name is None:
            raise ConfigError(f"it has no column {COLUMN}, which names its environment: one of {known}")
        close = nearest(name, names) if isinstance(name, str) else ""
        raise ConfigError(f"its environment={show(name)} is not one of environment_factory's: {known}{close}")
    return name
