"""What episodes cost beside the model: an engine that takes no time, real environment processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from agents import Dots, agents, always_look, make_tool_model, write_environments
from transformers import AutoTokenizer

from tora.environments.tools import Parsed, ToolCall

pytestmark = pytest.mark.slow  # measures time


def always_wait(text: str) -> Parsed:
    return Parsed("", (ToolCall("wait", {"seconds": 0.2}),))


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    make_tool_model(tmp_path)
    write_environments(tmp_path)
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    engine: Any = Dots(tokenizer(".")["input_ids"][0], tokenizer.eos_token_id)
    with agents(lambda: engine, tmp_path, parse=request.param, timeout_s=30.0, max_tokens=2000) as made:
        prompts = [made.prompt(number) for number in range(16)]
        made.worker.run_groups(prompts)  # environments are made
        yield lambda: made.worker.run_groups(prompts)


@pytest.mark.parametrize("worker", [always_look], indirect=True)
def test_a_turn_costs_less_than_two_milliseconds(worker) -> None:
    start = time.process_time()
    turns = sum(rollout.turns for group in worker() for rollout in group.rollouts)
    assert turns == 320 and (time.process_time() - start) / turns < 2e-3


@pytest.mark.parametrize("worker", [always_wait], indirect=True)
def test_slow_tools_of_64_episodes_run_at_once(worker) -> None:
    """Four times 0.2 s in each episode, of 51 s in all."""
    start = time.monotonic()
    groups = worker()
    seconds = time.monotonic() - start
    assert all(rollout.tool_calls == 4 and not rollout.tool_errors for group in groups for rollout in group.rollouts)
    assert 0.8 <= seconds < 3
