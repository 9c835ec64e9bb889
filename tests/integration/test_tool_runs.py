"""Short runs of the tool quick start and of an environment, with the torch engine and real processes."""

from __future__ import annotations

from pathlib import Path

from agents import check_tool_run
from runs import steps
from runs import train as short_run

HERE = ["async_rl=false", "rollout.engine=torch"]
GUESSING = [
    "dataset._component_=tora.tasks.guess_number.guess_number",
    "eval.dataset._component_=tora.tasks.guess_number.guess_number",
    "environment_factory._component_=tora.tasks.guess_number.GuessNumber",
    "rewards.0._component_=tora.environments.get_reward",
    "max_generated_tokens=160",
]


def test_in_one_process(tmp_path: Path) -> None:
    rows = short_run("quickstart_tools", tmp_path / "run", *HERE)
    check_tool_run(rows)
    assert all(row["mismatch_kl"] < 1e-9 for row in steps(rows)), "engine and learner are one model"


def test_an_environment_and_a_tool(tmp_path: Path) -> None:
    """The base knows nothing of the game: this is about the path, not about learning."""
    rows = short_run("quickstart_tools", tmp_path / "run", *HERE, *GUESSING)
    assert all("reward/failed/environment" not in row and row["rollout/turns_mean"] >= 1 for row in steps(rows))
    assert all(row["reward/get_reward"] == row["reward/mean"] for row in steps(rows))
