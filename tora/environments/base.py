"""The contract of environments, which is TRL's, so that a class written for TRL's `environment_factory` runs unchanged.

    class GuessNumber:
        def reset(self, **row) -> str | None: ...       # the dataset's row; what it returns ends the last user message
        def guess(self, number: int) -> str: ...        # a public method is a tool: type hints and a docstring
        def get_reward(self) -> float: ...              # optional; see `get_reward` below
        def get_turn_reward(self) -> float: ...         # optional, not TRL's: what the turn just answered has earned

Any method may be `async`. An instance serves one rollout at a time and is reset for the next. It has its own thread in
another process; see `tora.environments.processes`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tora.rewards.rewarder import event_loop

_NO_TOOLS = ("reset", "get_reward", "get_turn_reward")


class Environment(Protocol):
    """Its other public methods are tools."""

    def reset(self, **row: Any) -> Any:
        """Begin an episode for this row of the dataset, `prompt` included. Returns, or awaits, what is appended to the
        prompt's last message, or None: a string, or for a model that takes images also `content_of`'s forms."""
        ...


def get_reward(environments: Sequence[Any], **columns: Any) -> list[float | None]:
    """A reward function: what each environment's own `get_reward()` returns, sync or async; None for one without it,
    as in TRL."""
    asked = (getattr(environment, "get_reward", None) for environment in environments)
    return [None if ask is None else resolve(ask()) for ask in asked]


def tool_methods(kind: type) -> dict[str, Callable[..., Any]]:
    """The functions behind a class's tools, by name: its public methods except those of the contract."""
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: function for name, function in found if not name.startswith("_") and name not in _NO_TOOLS}


def resolve(value: Any) -> Any:
    """The value; of an awaitable its result, from this process's event loop. Not to be called in that loop."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return asyncio.run_coroutine_threadsafe(wait(), event_loop()).result()
