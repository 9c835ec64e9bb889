"""Which of a run's rewards is its accuracy: one that says so, not just the first."""

from __future__ import annotations

from collections.abc import Sequence

from tora.config.schema import Component

_BUILT_IN = ("math_answer", "answer_tag", "last_number")
"""Rewards that are 1 for a right answer and 0 for any other."""


def accuracy_reward(components: Sequence[Component]) -> str | None:
    """The name of the reward whose scores of at least 1 count as correct: the first with `accuracy: true`, else the
    first of the built-in ones for right answers without `accuracy: false`. None if there is none. Imports nothing."""
    declared = [component for component in components if component.get("accuracy") is True]
    built_in = [component for component in components if _is_built_in(component) and "accuracy" not in component]
    found = next(iter([*declared, *built_in]), None)
    return None if found is None else str(found.get("name", found["_component_"].rpartition(".")[2]))


def _is_built_in(component: Component) -> bool:
    package, _, name = str(component.get("_component_")).rpartition(".")
    return name in _BUILT_IN and f"{package}.".startswith(("tora.rewards.", "tora.tasks.rewards."))
