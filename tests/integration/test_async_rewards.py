"""Reward functions that are `async def`, in this process and in reward processes, alone and beside others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tora.rewards.processes import RewardProcesses
from tora.rewards.rewarder import build_rewarder
from tora.types import FailedReward, Prompt

SOURCE = """
import asyncio, os, time

_loops = set()

async def slow(prompts, completions, answer, **columns):
    await asyncio.sleep(0.4)
    return [float(c == a) for c, a in zip(completions, answer)]

async def also_slow(completions, completion_ids, *, scale=1.0, **columns):
    await asyncio.sleep(0.4)
    return [scale * len(ids) for ids in completion_ids]

class Judge:
    async def __call__(self, completions, **columns):
        await asyncio.sleep(0.4)
        return [None if c == "skip" else 1.0 for c in completions]

judge = Judge()

def plain(completions, **columns): return [2.0] * len(completions)
def awaitable(completions, **columns): return plain_later(completions)
async def plain_later(completions): return (3.0 for _ in completions)
async def raises(completions, **columns):
    await asyncio.sleep(0)
    return [float(len(c)) if c != "bad" else 1 / 0 for c in completions]
async def cancels(completions, **columns): raise asyncio.CancelledError
async def times_out_itself(completions, **columns): raise TimeoutError("the server said so")
async def too_few(completions, **columns): return [1.0]
async def hangs(completions, **columns):
    if "bad" in completions:
        await asyncio.sleep(3600)
    return [float(len(c)) for c in completions]
async def blocks(completions, **columns):
    if "bad" in completions:
        time.sleep(3600)
    return [float(len(c)) for c in completions]
async def refuses_to_end(completions, **columns):
    while "bad" in completions:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
    return [float(len(c)) for c in completions]
async def pid(completions, **columns): return [float(os.getpid())] * len(completions)
async def loops(completions, **columns):
    _loops.add(asyncio.get_running_loop())
    return [float(len(_loops))] * len(completions)
"""
PROMPT = Prompt(0, (1,), "q", {"answer": "2"})


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "async_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["in process", "in processes"])
def make(request: pytest.FixtureRequest, modules: None) -> Iterator[Callable]:
    made: list[RewardProcesses] = []

    def build(*names: str, timeout_s: float = 10.0):
        components = [{"_component_": f"async_rewards.{name}"} for name in names]
        if request.param == "in process":
            return build_rewarder(components)
        made.append(RewardProcesses(components, timeout_s=timeout_s, num_processes=1))
        return made[-1]

    yield build
    for each in made:
        each.close()


@pytest.fixture
def processes(modules: None) -> Iterator[Callable]:
    made: list[RewardProcesses] = []

    def build(*names: str, timeout_s: float, num_processes: int = 1) -> RewardProcesses:
        components = [{"_component_": f"async_rewards.{name}"} for name in names]
        made.append(RewardProcesses(components, timeout_s=timeout_s, num_processes=num_processes))
        return made[-1]

    yield build
    for each in made:
        each.close()


def ask(rewarder, texts: list[str]) -> list:
    return rewarder(PROMPT, texts, [[1] * len(text) for text in texts])


def test_async_functions_of_a_group_run_concurrently_and_beside_others(make: Callable) -> None:
    rewarder = make("slow", "plain", "also_slow", "judge", "awaitable")
    ask(rewarder, ["2"])  # starts what there is to start
    start = time.perf_counter()
    rows = ask(rewarder, ["2", "skip"])
    assert time.perf_counter() - start < 1.0, "three waits of 0.4 s"
    assert rows == [
        {"slow": 1.0, "plain": 2.0, "also_slow": 1.0, "judge": 1.0, "awaitable": 3.0},
        {"slow": 0.0, "plain": 2.0, "also_slow": 4.0, "judge": 0.0, "awaitable": 3.0},
    ]
    assert list(rows[0]) == ["slow", "plain", "also_slow", "judge", "awaitable"], "in the config's order"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("cancels", "raised CancelledError: "),
        ("times_out_itself", "raised TimeoutError: the server said so"),
        ("too_few", "returned 1 scores for 2 completions"),
    ],
)
def test_an_exception_is_that_of_a_plain_function(make: Callable, function: str, reason: str) -> None:
    rewarder = make(function)
    rows = ask(rewarder, ["bad", "a"])
    alone = isinstance(rewarder, RewardProcesses)  # which repeats a failed call for each completion
    if function == "too_few" and alone:
        assert rows == [{function: 1.0}] * 2
    elif function == "raises" and alone:
        assert rows == [FailedReward(function, reason), {function: 1.0}]
    else:
        assert rows == [FailedReward(function, reason)] * 2


def test_one_event_loop_serves_all_calls(make: Callable) -> None:
    rewarder = make("loops")
    first, again = (ask(rewarder, ["a"]) for _ in range(2))
    assert first == again


def test_arguments_are_bound(modules: None) -> None:
    rewarder = build_rewarder([{"_component_": "async_rewards.also_slow", "scale": 2.0}])
    assert rewarder.is_async(0)
    assert ask(rewarder, ["abc"]) == [{"also_slow": 6.0}]


def test_an_answer_that_hangs_scores_as_failed_and_its_process_stays(processes: Callable) -> None:
    rewarder = processes("hangs", "pid", timeout_s=0.5)
    (before,) = ask(rewarder, ["a"])
    start = time.perf_counter()
    good, bad, worse = ask(rewarder, ["a", "bad", "bad"])
    assert time.perf_counter() - start < 3, "0.5 s for the group and 0.5 s for its answers, which run concurrently"
    assert good == {"hangs": 1.0, "pid": before["pid"]}
    assert bad == worse == FailedReward("hangs", "took longer than 0.5 s", {"hangs": 0.0, "pid": before["pid"]})


@pytest.mark.parametrize("function", ["blocks", "refuses_to_end"])
def test_an_answer_that_cannot_be_cancelled_costs_only_itself(processes: Callable, function: str) -> None:
    rewarder = processes(function, timeout_s=0.5, num_processes=2)
    good, bad = ask(rewarder, ["a", "bad"])
    assert good == {function: 1.0}
    assert bad == FailedReward(function, "took longer than 0.5 s", {function: 0.0})
