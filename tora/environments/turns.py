"""The chat templates of a run's environments: each shows its own tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tora.config.environments import chosen
from tora.environments.template import TurnTemplate


class Turns:
    def __init__(self, templates: Mapping[str, TurnTemplate]) -> None:
        """`templates`: by the environments' names; that of the only one, or of tools alone, is called ""."""
        self.templates = dict(templates)

    def name_of(self, columns: Mapping[str, Any]) -> str:
        """The environment of a dataset's row. Raises ConfigError if it names none."""
        return chosen(columns, self.templates)

    def of(self, columns: Mapping[str, Any]) -> TurnTemplate:
        """Raises as `name_of`."""
        return self.templates[self.name_of(columns)]
