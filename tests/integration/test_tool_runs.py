"""Short runs of the tool quick start and of an environment, with the torch engine and real processes."""

from __future__ import annotations

from pathlib import Path

from agents import check_tool_run
from runs import steps
from runs import train as short_run

HERE = ["async_rl=false", "rollout.engine=torch"]


def test_in_one_process(tmp_path: Path) -> None:
    rows = short_run("quickstart_tools", tmp_path / "run", *HERE)
    check_tool_run(rows)
    assert all(row["mismatch_kl"] < 1e-9 for row in steps(rows)), "engine and learner are one model"


def test_an_environment(tmp_path: Path) -> None:
    rows = short_run("quickstart_guess", tmp_path / "run", *HERE)
    assert all("reward/failed/environment" not in row and row["rollout/turns_mean"] > 2 for row in steps(rows))
    assert all(row["reward/get_reward"] == row["reward/mean"] for row in steps(rows))
    assert any(row["learner/grad_norm"] > 0 for row in steps(rows))
