"""Short runs of the tool quick start and of an environment, with the torch engine and real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from agents import check_tool_run
from pages import ROOT, blocks, write_files
from runs import steps
from runs import train as short_run

from tora.reporting.completions import read_parquet

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


def test_the_environment_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its reader would: the page's files, and its lines of a config."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/agents.md"
    write_files(tmp_path, page)
    (lines,) = (b.text for b in blocks(page) if b.language == "yaml" and "path: mazes.jsonl" in b.text)
    (tmp_path / "maze.yaml").write_text(f"extends: quickstart_guess.yaml\n{lines}")
    small = ["num_steps=1", "batch_size=2", "max_generated_tokens=64", "rollout.max_refills=0", "log_completions=1"]
    (row,) = steps(short_run("maze.yaml", tmp_path / "run", *HERE, *small, "eval=null"))
    assert "reward/failed/environment" not in row and 0 <= row["reward/get_reward"] <= 1
    table = read_parquet(tmp_path / "run/completions/step_1.parquet")
    opened = [json.loads(r["messages"])[0]["content"] for r in table]
    assert opened == [" You see the doors red, green and blue."] * 8


@pytest.mark.slow  # the short runs above cover the rest
def test_a_tool_that_shows_pictures(tmp_path: Path) -> None:
    rows = short_run("quickstart_lookup", tmp_path / "run", *HERE)
    assert all("reward/failed/environment" not in row and row["mismatch_kl"] < 1e-9 for row in steps(rows))
    assert any(row["rollout/tool_calls_mean"] > 0 and row["learner/grad_norm"] > 0 for row in steps(rows))
    table = read_parquet(tmp_path / "run/completions/step_1.parquet")
    assert {len(row["images"]) - row["tool_calls"] + row["tool_errors"] for row in table} == {1}


@pytest.mark.slow  # each rollout makes a client of its own
def test_a_program_of_the_openai_client(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    rows = short_run("examples/agents/calculator.yaml", tmp_path / "run", *HERE)
    assert all(row["mismatch_kl"] < 1e-9 and "reward/failed/agent" not in row for row in steps(rows))
    assert any(row["rollout/tool_calls_mean"] > 0 and row["learner/grad_norm"] > 0 for row in steps(rows))
