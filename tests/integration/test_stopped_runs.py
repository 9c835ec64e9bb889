"""Runs that are stopped at any moment of their lives, with real Ray and real engines."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import tora_run, wait_for, wait_until_it_listens
from runs import read, steps

from tora.run.manifest import damage

_TORCH = ["rollout.engine=torch", "eval.num_prompts=16", "eval.every=3", "checkpoint.every=3"]
_NUM_STEPS = 18
_SITES = {
    "async": ["async_rl=true", "rollout.num_workers=2", "prompt_process=true"],
    "sync": ["async_rl=false"],
    "ranks": ["async_rl=false", "learner_ranks=2"],
    "vllm": ["async_rl=true", "rollout.engine=vllm"],
}


def output(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text()


def stop(run: subprocess.Popen[bytes], folder: Path, number: signal.Signals, within_s: float) -> float | None:
    """The seconds until a signal is acknowledged; None if the run had ended before it."""
    if run.poll() is not None:
        return None
    began = time.monotonic()
    os.killpg(run.pid, number) if number == signal.SIGINT else os.kill(run.pid, number)
    while "\nstopping" not in output(folder):
        if run.poll() is not None and "\nstopping" not in output(folder):
            assert run.returncode == 0, "ended without a word"
            return None
        assert time.monotonic() - began < within_s, "not acknowledged"
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_first_second_ends_the_run(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with tora_run(folder, *_TORCH, *_SITES["sync"], evaluates=True) as run:
        wait_until_it_listens(run)
        time.sleep(0.3)
        assert stop(run, folder, number, 5.0) is not None
        assert run.wait(3) == 130
    assert output(folder) == "\nstopping now\n" and not folder.exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("site", "count"), [("async", 12), ("sync", 8), ("ranks", 6), ("vllm", 4)])
def test_a_run_can_be_stopped_at_any_moment(site: str, count: int, tmp_path: Path) -> None:
    """30 moments over all four, from the first one to the last; `tora_run` sees that nothing is left behind. Half of
    them lie before the first step, for which a short run waits most of its life."""
    words, rng = [*_TORCH, *_SITES[site], f"num_steps={_NUM_STEPS}"], random.Random(site)
    with tora_run(tmp_path / "whole", *words, evaluates=True) as run:
        began = time.monotonic()
        wait_for(lambda: steps(read(tmp_path / "whole")), run, 300)
        start = time.monotonic() - began
        assert run.wait(600) == 0
        life = time.monotonic() - began
    slowest, late, phases = 0.0, 0, []
    for number in range(count):
        folder, kind = tmp_path / f"run_{number}", rng.choice([signal.SIGINT, signal.SIGTERM])
        # one moment of each stretch
        share = 2 * (number + rng.random()) / count
        moment = start * share if share < 1 else start + (life - start) * (share - 1)
        with tora_run(folder, *words, evaluates=True) as run:
            wait_until_it_listens(run)
            time.sleep(moment)
            seconds = stop(run, folder, kind, 5.0)
            code = run.wait(120)
        if seconds is None:  # this one was faster than the first
            assert code == 0
            late += 1
            continue
        assert code == 130, (moment, output(folder))
        slowest = max(slowest, seconds)
        done = len(steps(read(folder)))
        checkpoints = sorted((folder / "checkpoints").glob("step_*"))
        evaluations = len(read(folder)) - done
        phases.append(f"{moment:.1f} s ({done} steps, {evaluations} evaluations)")
        assert [int(row["step"]) for row in steps(read(folder))] == [*range(done)]
        if "stopping after" in output(folder) and site != "ranks":
            assert checkpoints and damage(checkpoints[-1]) is None
            assert int(checkpoints[-1].name[-6:]) == done
    assert late <= count // 3
    print(
        f"{site}: {count - late} stops, acknowledged within {slowest:.2f} s; first step at {start:.0f} of {life:.0f} s"
    )
    print("; ".join(phases))
    resumable = [tmp_path / f"run_{n}" for n in range(count) if [*(tmp_path / f"run_{n}").glob("checkpoints/step_*")]]
    for folder in resumable[:2]:
        with tora_run(folder, *words, "resume_from_checkpoint=true", evaluates=True) as run:
            assert run.wait(300) == 0
        assert [row["step"] for row in steps(read(folder))] == [*range(_NUM_STEPS)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("site", [*_SITES])
def test_a_second_signal_ends_the_run_within_three_seconds(site: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with tora_run(folder, *_TORCH, *_SITES[site], "num_steps=400") as run:
        wait_for(lambda: len(read(folder)) >= 2, run, 300)
        assert stop(run, folder, signal.SIGINT, 5.0) is not None
        began = time.monotonic()
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGINT)
        assert run.wait(10) == 130 and time.monotonic() - began < 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("site", [*_SITES])
def test_kill_9_of_the_driver_leaves_nothing(site: str, tmp_path: Path) -> None:
    """`tora_run` waits ten seconds for everything to be gone."""
    folder = tmp_path / "run"
    with tora_run(folder, *_TORCH, *_SITES[site], "num_steps=400") as run:
        wait_for(lambda: len(read(folder)) >= 1, run, 300)
        run.kill()
        assert run.wait(10) == -9


@pytest.mark.slow
def test_a_run_that_has_all_its_steps_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*_TORCH, *_SITES["sync"]]
    with tora_run(folder, *words, "num_steps=2") as run:
        assert run.wait(120) == 0
    for fewer in (2, 1):
        with tora_run(folder, *words, f"num_steps={fewer}", "resume_from_checkpoint=true") as run:
            assert run.wait(60) == 0
        assert f"has finished its {fewer} steps" in output(folder) and "step 1" not in output(folder)
