"""From a config's `rewards` to scores: calls reward functions as TRL does, and refuses what is no score."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from tora.components import locate
from tora.config import Component
from tora.errors import ConfigError, RolloutError, nearest
from tora.types import Prompt

RewardFunction = Callable[..., Sequence[float | None]]
_ARGUMENTS = ("prompts", "completions", "completion_ids")
_OWN_KEYS = ("_component_", "name", "weight")


@dataclass(frozen=True, slots=True)
class FunctionRewarder:
    """The `tora.protocols.Rewarder` of TRL-style functions; each is called once a group. Pickles if they do."""

    rewards: tuple[tuple[str, RewardFunction, float], ...]
    """Name, function and weight. Arguments bound by `functools.partial` hide dataset columns of the same name."""

    def __call__(
        self, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
    ) -> list[dict[str, float]]:
        """One dict of unweighted parts per completion, in the order of `rewards`; a function's None counts as 0.

        Raises `RolloutError`, naming the function, when one raises or returns something else than a finite number or
        None for each completion.
        """
        parts: list[dict[str, float]] = [{} for _ in texts]
        for name, function, _ in self.rewards:
            for part, score in zip(parts, _scores(name, function, prompt, texts, token_ids), strict=True):
                part[name] = score
        return parts

    def total(self, parts: dict[str, float]) -> float:
        return sum(weight * parts[name] for name, _, weight in self.rewards)


def build_rewarder(components: Sequence[Component]) -> FunctionRewarder:
    """Each component is a function's dotted path with optional `weight` (1) and `name` (the function's own).

    Its other keys are bound as arguments. Raises `ConfigError` for a path that leads nowhere, an argument that the
    function does not name, a weight that is no number, a name used twice, and no components.
    """
    if not components:
        raise ConfigError("rewards is empty, expected at least one reward function")
    rewards = tuple(_build(component) for component in components)
    names = [name for name, _, _ in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"rewards: {name} is there {names.count(name)} times; tell them apart with the key name")
    return FunctionRewarder(rewards)


def _build(component: Component) -> tuple[str, RewardFunction, float]:
    path = component.get("_component_")
    if not isinstance(path, str):
        raise ConfigError(f"rewards: {component} lacks _component_, the dotted path of a reward function")
    function, weight = locate(path), component.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ConfigError(f"rewards: the weight of {path} is {weight!r}, expected a number")
    bound = {key: value for key, value in component.items() if key not in _OWN_KEYS}
    # A function that takes any column by **kwargs would swallow a misspelt argument.
    named = [p for p in inspect.signature(function).parameters if p not in _ARGUMENTS]
    for key in bound:
        if key not in named:
            raise ConfigError(f"rewards: {path} has no argument {key!r}{nearest(key, named)}")
    name = str(component.get("name", path.rpartition(".")[2]))
    return name, partial(function, **bound) if bound else function, float(weight)


def _scores(
    name: str, function: RewardFunction, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> list[float]:
    chat = not isinstance(prompt.source, str)
    bound = function.keywords if isinstance(function, partial) else {}
    columns = {key: [value] * len(texts) for key, value in prompt.columns.items() if key not in bound}
    if "completion_ids" in inspect.signature(function).parameters:
        columns["completion_ids"] = [list(ids) for ids in token_ids]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts)
    try:
        scores = function(prompts=[prompt.source] * len(texts), completions=completions, **columns)
    except Exception as error:  # a user's code may raise anything; the rollout is lost, and the reason is told
        raise RolloutError(f"reward {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(scores, Sequence) and hasattr(scores, "tolist"):
        scores = scores.tolist()  # an array or a tensor
    if not isinstance(scores, Sequence) or len(scores) != len(texts):
        found = f"{len(scores)} scores" if isinstance(scores, Sequence) else f"a {type(scores).__name__}"
        raise RolloutError(f"reward {name} returned {found} for {len(texts)} completions")
    return [_score(name, score) for score in scores]


def _score(name: str, score: Any) -> float:
    if score is None:
        return 0.0
    if not isinstance(score, Real) and getattr(score, "ndim", None) == 0:
        score = score.item()  # a scalar tensor
    if not isinstance(score, Real) or not math.isfinite(score):
        raise RolloutError(f"reward {name} returned {score!r}, expected a finite number or None")
    return float(score)
