"""An environment of OpenEnv, behind its server, as one of Tora's: `pip install openenv`.

    environment_factory: {_component_: tora.environments.openenv.OpenEnv, base_url: "http://localhost:8000"}

Its only tool is `step`, whose argument is the environment's action. Each rollout has a connection of its own.
"""

from __future__ import annotations

import functools
import json
import secrets
from typing import Any

from tora.environments import openenv_client
from tora.environments.base import resolve
from tora.environments.elsewhere import RemoteError, shared
from tora.errors import ConfigError

_DONE = "The episode is over."
_RESET = ("seed", "episode_id")
"""What a reset takes of a row, beside the names in `reset_columns`."""
_ASK = "tora.environments.openenv_client.ask"


class OpenEnv:
    def __init__(
        self,
        base_url: str,
        text: str | None = None,
        reset_columns: tuple[str, ...] | list[str] = (),
        python: str | None = None,
    ) -> None:
        """`base_url`: of the server. `text`: the field of an observation that the policy reads; None for all of it, as
        JSON. `reset_columns`: columns of the dataset that a reset takes, beside `seed` and `episode_id`. `python`: the
        interpreter that has OpenEnv, which cannot be installed beside vLLM; None for this one.

        Raises ConfigError if there is no such interpreter or OpenEnv is not installed.
        """
        _load(python)
        self._base_url, self._python = base_url, python
        self._text, self._columns = text, {*_RESET, *reset_columns}
        self._name = secrets.token_hex(8)

    async def reset(self, **row: Any) -> str:
        self._total, self._earned, self._done = 0.0, 0.0, False
        return await self._ask("reset", {name: value for name, value in row.items() if name in self._columns})

    async def step(self, action: dict) -> str:
        """
        Act.

        Args:
            action: The action's fields by name.
        """
        if self._done:
            self._earned = 0.0
            return _DONE
        return await self._ask("step", action)

    def get_reward(self) -> float:
        """The sum of the rewards of all steps."""
        return self._total

    def get_turn_reward(self) -> float:
        """For `credit: turn`, with a reward of another function for the whole episode."""
        return self._earned

    async def _ask(self, operation: str, arguments: dict[str, Any]) -> str:
        asked = {"base_url": self._base_url, "operation": operation, "arguments": arguments}
        if self._python is None:
            answer = await openenv_client.ask(self._name, **asked)
        else:
            answer = await shared(self._python, _ASK).answer(environment=self._name, **asked)
        observation, reward, is_done = answer
        self._earned, self._done = float(reward or 0.0), bool(is_done)
        self._total += self._earned
        shown = observation if self._text is None else observation.get(self._text, "")
        return shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False, default=str)


@functools.cache
def _load(python: str | None) -> None:
    """Import OpenEnv where it is asked, while the process of environments starts and no rollout waits."""
    nothing: dict[str, Any] = {"environment": "", "base_url": "", "operation": "import", "arguments": {}}
    try:
        if python is None:
            resolve(openenv_client.ask(**nothing))
        else:
            shared(python, _ASK)(**nothing)
    except (ImportError, RemoteError) as error:
        where = "" if python is None else f" in {python}"
        raise ConfigError(f"OpenEnv needs its package{where}: pip install openenv ({error})") from error
