"""Build reward functions from a config's `rewards`, call them as TRL does, and reject invalid scores."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from tora.config.components import locate
from tora.config.schema import Component
from tora.errors import ConfigError, nearest
from tora.types import FailedReward, Prompt

Column = list[float | FailedReward | None]
"""A reward function's scores, one for each completion."""
RewardFunction = Callable[..., Sequence[float | None]]
_ARGUMENTS = ("prompts", "completions", "completion_ids")
_OWN_KEYS = ("_component_", "name", "weight")


@dataclass(frozen=True, slots=True)
class FunctionRewarder:
    """The `tora.protocols.Rewarder` for TRL-style functions, each called once per group. Pickles if they do."""

    rewards: tuple[tuple[str, RewardFunction, float], ...]
    """Name, function and weight. An argument bound by `functools.partial` hides a dataset column of that name."""

    def __call__(
        self, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
    ) -> list[dict[str, float] | FailedReward]:
        """See `combine`."""
        columns = [self.column(index, prompt, texts, token_ids) for index in range(len(self.rewards))]
        return combine(columns, [name for name, _, _ in self.rewards])

    def column(self, index: int, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> Column:
        """The scores of one function. All fail if it raises or returns the wrong number of scores."""
        name, function, _ = self.rewards[index]
        try:
            return [_score(name, score) for score in _scores(function, prompt, texts, token_ids)]
        except Exception as error:  # a user's code may raise anything; the rollouts are lost and the reason is reported
            reason = str(error) if isinstance(error, _BadResult) else f"raised {type(error).__name__}: {error}"
            return [FailedReward(name, reason)] * len(texts)

    def total(self, parts: dict[str, float]) -> float:
        return total(parts, {name: weight for name, _, weight in self.rewards})

    def close(self) -> None:
        """Nothing to release."""


def combine(columns: Sequence[Column], names: Sequence[str]) -> list[dict[str, float] | FailedReward]:
    """For each completion a dict with the unweighted score of each function, or its first failure.

    As in TRL, a score of None means that the function does not apply, and counts as 0. A completion fails if every
    function returns None for it.
    """
    rows: list[dict[str, float] | FailedReward] = []
    for scores in zip(*columns, strict=True):
        failed = next((score for score in scores if isinstance(score, FailedReward)), None)
        if failed is None and all(score is None for score in scores):
            failed = FailedReward(", ".join(names), "returned None")
        rows.append(failed or {name: score or 0.0 for name, score in zip(names, scores, strict=True)})
    return rows


def total(parts: dict[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of a completion's scores."""
    return sum(weight * parts[name] for name, weight in weights.items())


def build_rewarder(components: Sequence[Component]) -> FunctionRewarder:
    """Each component has a function's dotted path and optionally `weight` (default 1) and `name` (the function's name).

    Its other keys are bound as arguments. Raises `ConfigError` if there are no components, a path does not exist, the
    function does not name an argument, a weight is not a finite number, or a name is used twice.
    """
    if not components:
        raise ConfigError("rewards is empty, expected at least one reward function")
    rewards = tuple(_build(component) for component in components)
    names = [name for name, _, _ in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"rewards: {name} is used {names.count(name)} times; give each reward a different `name`")
    return FunctionRewarder(rewards)


def names_and_weights(components: Sequence[Component]) -> tuple[list[str], dict[str, float]]:
    """Names and weights of components that `build_rewarder` accepts, without importing their functions."""
    names = [_name(component) for component in components]
    weights = [float(component.get("weight", 1.0)) for component in components]
    return names, dict(zip(names, weights, strict=True))


def _name(component: Component) -> str:
    return str(component.get("name", component["_component_"].rpartition(".")[2]))


def _build(component: Component) -> tuple[str, RewardFunction, float]:
    path = component.get("_component_")
    if not isinstance(path, str):
        raise ConfigError(f"rewards: {component} lacks _component_, the dotted path of a reward function")
    function, weight = locate(path), component.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ConfigError(f"rewards: the weight of {path} is {weight!r}, expected a finite number")
    bound = {key: value for key, value in component.items() if key not in _OWN_KEYS}
    # A function with **kwargs for the dataset's columns would silently accept a misspelled argument.
    named = [p for p in inspect.signature(function).parameters if p not in _ARGUMENTS]
    for key in bound:
        if key not in named:
            raise ConfigError(f"rewards: {path} has no argument {key!r}{nearest(key, named)}")
    return _name(component), partial(function, **bound) if bound else function, float(weight)


class _BadResult(Exception):
    """A function did not return a list with one score per completion."""


def _scores(
    function: RewardFunction, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> Sequence[Any]:
    chat = not isinstance(prompt.source, str)
    bound = function.keywords if isinstance(function, partial) else {}
    columns = {key: [value] * len(texts) for key, value in prompt.columns.items() if key not in bound}
    if "completion_ids" in inspect.signature(function).parameters:
        columns["completion_ids"] = [list(ids) for ids in token_ids]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts)
    scores = function(prompts=[prompt.source] * len(texts), completions=completions, **columns)
    if not isinstance(scores, Sequence) and hasattr(scores, "tolist"):
        scores = scores.tolist()  # an array or a tensor
    if not isinstance(scores, Sequence) or len(scores) != len(texts):
        found = f"{len(scores)} scores" if isinstance(scores, Sequence) else f"a {type(scores).__name__}"
        raise _BadResult(f"returned {found} for {len(texts)} completions")
    return scores


def _score(name: str, score: Any) -> float | FailedReward | None:
    if score is None:
        return None
    if not isinstance(score, Real) and getattr(score, "ndim", None) == 0:
        score = score.item()  # a scalar tensor
    if not isinstance(score, Real) or not math.isfinite(score):
        return FailedReward(name, f"returned {score!r}, expected a finite number or None")
    return float(score)
