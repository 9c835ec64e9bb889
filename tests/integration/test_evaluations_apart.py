"""A run whose evaluations have a worker of their own, with real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import own_imports, steps, train

_REWARDS = """
import os

def length(completion_ids, **kwargs):
    return [1 / (1 + abs(len(ids) - 12)) for ids in completion_ids]

def gives_way(completions, **kwargs):
    return [float(os.sched_getscheduler(0) == os.SCHED_IDLE)] * len(completions)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_they_give_way_to_training(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward processes have the policy of the thread that starts them."""
    own_imports(monkeypatch)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "own_rewards.py").write_text(_REWARDS)
    rewards = "[{_component_: own_rewards.length}, {_component_: own_rewards.gives_way, weight: 1000}]"
    words = [f"rollout.engine={engine}", "eval.num_workers=1", "eval.every=2", "num_steps=12", "checkpoint.every=100"]
    rows = train("quickstart", tmp_path / "run", *words, f"import_from=[{tmp_path}]", f"rewards={rewards}")
    assert {row["reward/gives_way"] for row in steps(rows)} == {0} and len(steps(rows)) == 12
    assert {row["rollout/workers"] for row in steps(rows)} == {1}
    evaluated = [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert len(evaluated) > 2 and max(evaluated[:-1]) > 1000, "the last one is waited for, and the other worker helps"
