"""A user's program that plays an episode itself, as an environment: it asks the policy through an endpoint."""

from __future__ import annotations

from typing import Any

from tora.config.components import locate
from tora.environments.base import resolve
from tora.environments.elsewhere import shared


class Program:
    def __init__(self, program: str, python: str | None = None) -> None:
        """`program`: dotted path of a function `f(base_url, api_key, **row)`, sync or async, that returns the episode's
        reward or None. `python`: the interpreter that runs it; None for this one. Raises ConfigError if one of them
        does not exist."""
        self._program = locate(program) if python is None else shared(python, program)

    def reset(self, **row: Any) -> None:
        self._row, self._reward = row, None

    def play(self, base_url: str, api_key: str) -> str:
        self._reward = resolve(self._program(base_url=base_url, api_key=api_key, **self._row))
        return ""

    def get_reward(self) -> Any:
        return self._reward
