"""The simulator: the real loop, pool and buffer around sleeping workers and a sleeping learner."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tora.bench.simulate import Scenario, simulate
from tora.cli import main


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "async", "--actors", "8", "--gen-latency", "0.2", "--learn-latency", "0.2", "--steps", "6"]
    assert main([*words, "--json", str(tmp_path / "runs.json")]) == 0
    asynchronous, synchronous, without_sleep = json.loads((tmp_path / "runs.json").read_text())
    assert asynchronous["staleness"] == {"1": 1.0} and synchronous["staleness"] == {"0": 1.0}
    assert asynchronous["num_groups"] == synchronous["num_groups"] == 48
    assert asynchronous["groups_per_s"] > 1.4 * synchronous["groups_per_s"], "learning hides generating"
    assert synchronous["seconds"] >= 6 * 0.4 and asynchronous["seconds"] >= 6 * 0.2
    assert without_sleep["overhead_ms"] > 0 and asynchronous["overhead_ms"] is None
    assert "against sync" in capsys.readouterr().out


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_staleness_keeps_the_bound_when_latencies_vary(bound: int) -> None:
    measured = simulate(Scenario(24, gen_latency=0.01, learn_latency=0.01, jitter=1.0, num_steps=20), bound)
    assert max(measured.staleness) <= bound
    assert sum(measured.staleness.values()) == pytest.approx(1)
    assert measured.num_groups == 24 * 20


def test_oversampling_hides_slow_groups() -> None:
    waiting = Scenario(16, gen_latency=0.1, learn_latency=0.1, jitter=1.0, num_steps=12)
    measured = simulate(replace(waiting, oversample=0.25), 1)
    assert measured.seconds < 0.8 * simulate(waiting, 1).seconds
    assert max(measured.staleness) <= 1 and measured.num_groups == 16 * 12


def test_a_learner_that_begins_early_waits_less() -> None:
    waiting = Scenario(16, gen_latency=0.1, learn_latency=0.1, jitter=0.5, num_steps=20, step_parts=1)
    measured = simulate(replace(waiting, step_parts=4), 1)
    assert measured.seconds < 0.93 * simulate(waiting, 1).seconds
    assert max(measured.staleness) <= 1 and sum(measured.staleness.values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize(("jitter", "bar"), [(0.5, 1.25), (1.0, 1.8)])
def test_oversampling_keeps_the_pace_of_a_run_without_jitter(jitter: float, bar: float) -> None:
    even = Scenario(16, gen_latency=0.2, learn_latency=0.2, jitter=0.0, num_steps=60)
    measured = simulate(replace(even, jitter=jitter, oversample=0.25), 1)
    assert measured.seconds <= bar * simulate(even, 1).seconds


def test_a_slow_learner_never_waits() -> None:
    measured = simulate(Scenario(8, gen_latency=0.02, learn_latency=0.2, jitter=0.2, num_steps=5), 1)
    assert 5 * 0.2 <= measured.seconds < 5 * 0.2 * 1.3


def test_impossible_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "async", "--actors", "0"]) == 2
    assert main(["bench", "async", "--gen-latency", "-1"]) == 2
    assert capsys.readouterr().err == "--actors 0 must be at least 1.\n--gen-latency -1.0 must be at least 0.\n"


@pytest.mark.slow
def test_speedup_and_overhead_at_256_workers() -> None:
    scenario = Scenario(256, gen_latency=1.0, learn_latency=1.0, jitter=0.0, num_steps=10)
    ratio = simulate(scenario, 1).groups_per_s / simulate(scenario, 0).groups_per_s
    assert ratio >= 1.8
    without_sleep = simulate(Scenario(256, 0.0, 0.0, 0.0, num_steps=20), 1)
    assert without_sleep.overhead_ms is not None and without_sleep.overhead_ms < 2


@pytest.mark.slow  # three runs that each start processes of environments
def test_what_tools_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 episodes of 5 turns at once, with tools that take 0.2 s."""
    assert main(["bench", "episodes", "--json", str(tmp_path / "runs.json")]) == 0
    slow, fast, bare = json.loads((tmp_path / "runs.json").read_text())
    assert fast["step_seconds"] >= 5 and slow["step_seconds"] <= 1.2 * fast["step_seconds"]
    assert bare["ms_per_turn"] < 2
    assert "times as long" in capsys.readouterr().out
    assert main(["bench", "episodes", "--turns", "1"]) == 2
