"""A user's program that plays an episode itself, as an environment: it asks the policy through an endpoint."""

from __future__ import annotations

from typing import Any

from tora.config.components import locate
from tora.environments.base import resolve


class Program:
    def __init__(self, program: str) -> None:
        """`program`: dotted path of a function `f(base_url, api_key, **row)`, sync or async, that returns the episode's
        reward or None. Raises ConfigError if it does not exist."""
        self._program = locate(program)

    def reset(self, **row: Any) -> None:
        self._row, self._reward = row, None

    def play(self, base_url: str, api_key: str) -> str:
        self._reward = resolve(self._program(base_url=base_url, api_key=api_key, **self._row))
        return ""

    def get_reward(self) -> Any:
        return self._reward
