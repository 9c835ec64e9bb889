"""An environment of OpenEnv, behind its server, as one of Tora's: `pip install openenv`.

    environment_factory: {_component_: tora.environments.openenv.OpenEnv, base_url: "http://localhost:8000"}

Its only tool is `step`, whose argument is the environment's action. Each rollout has a connection of its own.
"""

from __future__ import annotations

import json
from typing import Any

from tora.errors import ConfigError

_DONE = "The episode is over."
_RESET = ("seed", "episode_id")
"""What a reset takes of a row, beside the names in `reset_columns`."""


class OpenEnv:
    def __init__(self, base_url: str, text: str | None = None, reset_columns: tuple[str, ...] | list[str] = ()) -> None:
        """`base_url`: of the server. `text`: the field of an observation that the policy reads; None for all of it, as
        JSON. `reset_columns`: columns of the dataset that a reset takes, beside `seed` and `episode_id`.

        Raises ConfigError if OpenEnv is not installed.
        """
        try:
            from openenv.core.generic_client import GenericEnvClient  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(f"OpenEnv needs its package: pip install openenv ({error.name} is missing)") from error
        self._make = lambda: GenericEnvClient(base_url=base_url)
        self._text, self._columns = text, {*_RESET, *reset_columns}
        self._client: Any = None

    async def reset(self, **row: Any) -> str:
        if self._client is None:
            self._client = self._make()
            await self._client.connect()
        self._total, self._earned, self._done = 0.0, 0.0, False
        return self._take(await self._client.reset(**{k: v for k, v in row.items() if k in self._columns}))

    async def step(self, action: dict) -> str:
        """
        Act.

        Args:
            action: The action's fields by name.
        """
        if self._done:
            self._earned = 0.0
            return _DONE
        return self._take(await self._client.step(action))

    def get_reward(self) -> float:
        """The sum of the rewards of all steps."""
        return self._total

    def get_turn_reward(self) -> float:
        """For `credit: turn`, with a reward of another function for the whole episode."""
        return self._earned

    def _take(self, result: Any) -> str:
        self._earned, self._done = float(result.reward or 0.0), bool(result.done)
        self._total += self._earned
        shown = result.observation if self._text is None else result.observation.get(self._text, "")
        return shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False, default=str)
