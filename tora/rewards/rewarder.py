"""Build reward functions from a config's `rewards`, call them as TRL does, and reject invalid scores.

Functions that are `async def` run concurrently, on one event loop that lasts as long as the process: clients that a
module keeps, such as HTTP sessions, stay usable from call to call.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from numbers import Real
from types import MappingProxyType
from typing import Any

from tora.config.components import locate
from tora.config.schema import Component
from tora.errors import ConfigError, nearest, place_of
from tora.rewards.notes import AT_START, Notes, TrainerState
from tora.types import FailedReward, Prompt

Completion = str | list[dict[str, Any]]
"""A completion's text, or the messages of an episode."""
Column = list[float | FailedReward | None]
"""A reward function's scores, one for each completion."""
RewardFunction = Callable[..., Any]
"""Returns a sequence of numbers and None, or an awaitable of one."""
_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra", "environments")
"""Those of TRL's signature, which hide a dataset column of the same name."""
_OWN_KEYS = ("_component_", "name", "weight", "timeout_score", "accuracy")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one function."""

    index: int
    """The function's place in the config's list."""
    texts: Sequence[Completion]
    token_ids: Sequence[Sequence[int]]
    environments: Sequence[Any] | None = None
    """For a function that takes them, the environment of each completion."""
    state: TrainerState = AT_START
    notes: Notes = field(default_factory=Notes)
    """Filled by the function."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Stands in for the column of a call that did not return."""

    reason: str
    """A clause with the function as its subject."""
    is_timeout: bool


@dataclass(frozen=True, slots=True)
class FunctionRewarder:
    """The `tora.protocols.Rewarder` for TRL-style functions, each called once per group. Pickles if they do."""

    rewards: tuple[tuple[str, RewardFunction, float], ...]
    """Name, function and weight. An argument bound by `functools.partial` hides a dataset column of that name."""

    def __call__(
        self,
        prompt: Prompt,
        texts: Sequence[Completion],
        token_ids: Sequence[Sequence[int]],
        known: Mapping[int, Column] = MappingProxyType({}),
        *,
        state: TrainerState = AT_START,
        notes: Notes | None = None,
    ) -> list[dict[str, float] | FailedReward]:
        """See `combine`. Without a time limit."""
        notes = Notes() if notes is None else notes
        numbers = [index for index in range(len(self.rewards)) if index not in known]
        calls = [Call(index, texts, token_ids, state=state, notes=notes) for index in numbers]
        answers = zip((call.index for call in calls), self.columns(prompt, calls), strict=True)
        columns = {**known, **{index: answer for index, answer in answers if not isinstance(answer, Unanswered)}}
        return combine([columns[index] for index in sorted(columns)], [name for name, _, _ in self.rewards])

    def takes_environments(self, index: int) -> bool:
        """Whether a function has a parameter `environments`."""
        return "environments" in inspect.signature(self.rewards[index][1]).parameters

    def takes_images(self, index: int) -> bool:
        """Whether a function names a parameter `images` or `image`."""
        return not {"images", "image"}.isdisjoint(inspect.signature(self.rewards[index][1]).parameters)

    def is_async(self, index: int) -> bool:
        """Whether a function is `async def`, or an object whose `__call__` is."""
        function = self.rewards[index][1]
        target = function.func if isinstance(function, partial) else function
        return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(target.__call__)

    def columns(self, prompt: Prompt, calls: Sequence[Call], limit_s: float | None = None) -> list[Column | Unanswered]:
        """The scores of each call. All scores of a call fail if it raises or returns the wrong number of them.

        Calls of async functions run concurrently, each for at most `limit_s` seconds, while the others run in order.
        """
        started = {
            place: asyncio.run_coroutine_threadsafe(self._await_column(prompt, call, limit_s), event_loop())
            for place, call in enumerate(calls)
            if self.is_async(call.index)
        }
        return [
            started[place].result() if place in started else self._column(prompt, call)
            for place, call in enumerate(calls)
        ]

    def _column(self, prompt: Prompt, call: Call) -> Column:
        name, function, _ = self.rewards[call.index]
        try:
            scores = function(**_arguments(function, prompt, call))
            if inspect.isawaitable(scores):
                scores = asyncio.run_coroutine_threadsafe(_result(scores), event_loop()).result()
            return _checked(name, scores, len(call.texts))
        except Exception as error:  # a user's code may raise anything; the rollouts are lost and the reason is reported
            return _failed(name, error, len(call.texts))

    async def _await_column(self, prompt: Prompt, call: Call, limit_s: float | None) -> Column | Unanswered:
        name, function, _ = self.rewards[call.index]
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                scores = await function(**_arguments(function, prompt, call))
            return _checked(name, scores, len(call.texts))
        except (Exception, asyncio.CancelledError) as error:
            if limit.expired() and limit_s is not None:
                return Unanswered(took_longer(limit_s), is_timeout=True)
            return _failed(name, error, len(call.texts))

    def total(self, parts: Mapping[str, float]) -> float:
        return total(parts, {name: weight for name, _, weight in self.rewards})

    def close(self) -> None:
        """Nothing to release."""


def combine(columns: Sequence[Column], names: Sequence[str]) -> list[dict[str, float] | FailedReward]:
    """For each completion a dict with the unweighted score of each function, or its first failure.

    As in TRL, a score of None means that the function does not apply, and counts as 0. A completion fails if every
    function returns None for it. A failure that has `parts` gets those of the other functions too, unless one of these
    fails without any.
    """
    return [_row(scores, names) for scores in zip(*columns, strict=True)]


def _row(scores: Sequence[float | FailedReward | None], names: Sequence[str]) -> dict[str, float] | FailedReward:
    failures = [score for score in scores if isinstance(score, FailedReward)]
    for failure in failures:
        if failure.parts is None:
            return failure
    if all(score is None for score in scores):
        return FailedReward(", ".join(names), "returned None")
    parts: dict[str, float] = {}
    for name, score in zip(names, scores, strict=True):
        parts |= score.parts or {} if isinstance(score, FailedReward) else {name: score or 0.0}
    return replace(failures[0], parts=parts) if failures else parts


def total(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of a completion's scores."""
    return sum(weight * parts[name] for name, weight in weights.items())


def build_rewarder(components: Sequence[Component]) -> FunctionRewarder:
    """Each component has a function's dotted path, and optionally `weight` (default 1), `timeout_score` (default 0) and
    `name` (the function's name).

    Its other keys are bound as arguments. Raises ConfigError if there are no components, a path does not exist, the
    function does not name an argument, a weight or timeout_score is not a finite number, or a name is used twice.
    """
    if not components:
        raise ConfigError("rewards is empty, expected at least one reward function")
    rewards = tuple(_build(component) for component in components)
    names = [name for name, _, _ in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"rewards: {name} is used {names.count(name)} times; give each reward a different `name`")
    return FunctionRewarder(rewards)


def setting_by_name(components: Sequence[Component], key: str, default: float) -> dict[str, float]:
    """`weight` or `timeout_score` of each component, by name, in order. Imports nothing.

    The components must be such as `build_rewarder` accepts.
    """
    return {_name(component): float(component.get(key, default)) for component in components}


def took_longer(limit_s: float) -> str:
    return f"took longer than {limit_s:.3g} s"


def _name(component: Component) -> str:
    return str(component.get("name", component["_component_"].rpartition(".")[2]))


def _build(component: Component) -> tuple[str, RewardFunction, float]:
    path = component.get("_component_")
    if not isinstance(path, str):
        raise ConfigError(f"rewards: {component} lacks _component_, the dotted path of a reward function")
    function = locate(path)
    for key in ("weight", "timeout_score"):
        value = component.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ConfigError(f"rewards: the {key} of {path} is {value!r}, expected a finite number")
    bound = {key: value for key, value in component.items() if key not in _OWN_KEYS}
    # A function with **kwargs for the dataset's columns would silently accept a misspelled argument.
    named = [p for p in inspect.signature(function).parameters if p not in _ARGUMENTS]
    for key in bound:
        if key not in named:
            raise ConfigError(f"rewards: {path} has no argument {key!r}{nearest(key, named)}")
    if inspect.isclass(function):
        return _name(component), _instance(path, function, bound), float(component.get("weight", 1.0))
    return _name(component), partial(function, **bound) if bound else function, float(component.get("weight", 1.0))


def _instance(path: str, kind: type, arguments: dict[str, Any]) -> RewardFunction:
    try:
        made = kind(**arguments)
    except ConfigError:
        raise
    except Exception as error:  # a user's code may raise anything
        reason = f"{type(error).__name__}: {error}{place_of(error)}"
        raise ConfigError(f"rewards: {path} cannot be made: it raised {reason}") from error
    if not callable(made):
        raise ConfigError(f"rewards: {path} is a class whose instances cannot be called; give it a method __call__")
    return made


class _BadResult(Exception):
    """A function did not return a list with one score per completion."""


def _arguments(function: RewardFunction, prompt: Prompt, call: Call) -> dict[str, Any]:
    bound = function.keywords if isinstance(function, partial) else {}
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    count = len(call.texts)
    are_messages = not isinstance(prompt.source, str)
    offered: dict[str, Any] = {
        **{key: [value] * count for key, value in prompt.columns.items()},
        "prompts": [prompt.source] * count,
        "completions": [_as_messages(text) if are_messages else text for text in call.texts],
        "completion_ids": [list(ids) for ids in call.token_ids],
        "trainer_state": call.state,
        "log_metric": call.notes.log_metric,
        "log_extra": call.notes.extra_of(count),
    }
    if "images" in parameters or "image" in parameters:
        from tora.models.vision.processor import decode

        pictures = [decode(image) for image in prompt.images]
        offered |= {"images": [pictures] * count, "image": [pictures[0] if pictures else None] * count}
    if "environments" in parameters:
        offered["environments"] = call.environments
    return {key: value for key, value in offered.items() if (takes_any or key in parameters) and key not in bound}


def _as_messages(completion: Completion) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _checked(name: str, scores: Any, count: int) -> Column:
    """The column of a function's result. Raises `_BadResult` if it is not a sequence of `count` scores."""
    if isinstance(scores, Iterator):
        scores = list(scores)
    elif not isinstance(scores, Sequence) and hasattr(scores, "tolist"):
        scores = scores.tolist()  # an array or a tensor
    if not isinstance(scores, Sequence) or len(scores) != count:
        found = f"{len(scores)} scores" if isinstance(scores, Sequence) else f"a {type(scores).__name__}"
        raise _BadResult(f"returned {found} for {count} completions")
    return [_score(name, score) for score in scores]


def _failed(name: str, error: BaseException, count: int) -> Column:
    if isinstance(error, _BadResult):
        return [FailedReward(name, str(error))] * count
    return [FailedReward(name, f"raised {type(error).__name__}: {error}", place=place_of(error))] * count


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """This process's loop for reward functions and environments, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _score(name: str, score: Any) -> float | FailedReward | None:
    if score is None:
        return None
    if not isinstance(score, Real) and getattr(score, "ndim", None) == 0:
        score = score.item()  # a scalar tensor
    if not isinstance(score, Real) or not math.isfinite(score):
        return FailedReward(name, f"returned {score!r}, expected a finite number or None")
    return float(score)
