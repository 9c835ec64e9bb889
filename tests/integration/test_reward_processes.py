"""Reward functions that hang, crash or return nonsense, in real processes, and the effect on their rollouts."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from fakes import FakeWorker, make_group, make_prompt, make_snapshot
from pools import config, next_batch, running

from actors.group_filter import SignalFilter
from actors.worker import RolloutWorker
from tora.batching.train_batch import make_batch
from tora.errors import ConfigError, RolloutError
from tora.reporting.evaluation import passes_by, summarize
from tora.rewards.processes import RewardProcesses
from tora.types import BadLogprob, FailedReward, Group, GroupResult, Prompt

SOURCE = """
import os, re, time

def _each(completions, bad, act):
    if any(c == bad for c in completions):
        act()
    return [float(len(c)) for c in completions]

def good(completions, **columns): return [1.0] * len(completions)
def raises(completions, **columns): return _each(completions, "bad", lambda: 1 / 0)
def hangs(completions, **columns): return _each(completions, "bad", lambda: time.sleep(3600))
# a single C call that holds the GIL and blocks signal handlers
def holds_the_lock(completions, **columns): return _each(completions, "bad", lambda: re.match("(a+)+$", "a" * 60 + "b"))
def dies(completions, **columns): return _each(completions, "bad", lambda: os._exit(3))
def nan(completions, **columns): return [float("nan") if c == "bad" else 1.0 for c in completions]
def forgets(completions, **columns): return None
def too_few(completions, **columns): return [float(len(c)) for c in completions][: 1 if "bad" in completions else None]
def half_a_second_each(completions, **columns): time.sleep(0.5 * len(completions)); return [1.0] * len(completions)
def slow(completions, **columns): time.sleep(0.3); return [1.0] * len(completions)
def pid(completions, **columns): return [float(os.getpid())] * len(completions)
"""
Scored = TypeVar("Scored", Group, GroupResult)
PROMPT = Prompt(0, (1,), "q", {"answer": "2"})


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(modules: None) -> Iterator[object]:
    made: list[RewardProcesses] = []

    def build(*names: str, timeout_s: float = 4.0, num_processes: int = 2) -> RewardProcesses:
        components = [{"_component_": f"odd_rewards.{name}"} for name in names]
        made.append(RewardProcesses(components, timeout_s=timeout_s, num_processes=num_processes))
        return made[-1]

    yield build
    for each in made:
        each.close()


def ask(rewarder: RewardProcesses, texts: list[str]) -> list:
    return rewarder(PROMPT, texts, [[1]] * len(texts))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("hangs", "took longer than 2 s"),
        ("holds_the_lock", "took longer than 2 s"),
        ("dies", "ended its process"),
        ("nan", "returned nan"),
    ],
)
def test_a_bad_completion_costs_only_itself(make, function: str, reason: str) -> None:
    rewarder = make("good", function, timeout_s=2)
    rows = ask(rewarder, ["a", "bad", "abc"])
    assert isinstance(rows[1], FailedReward)
    assert (rows[1].name, rows[1].reason[: len(reason)]) == (function, reason)
    stays = reason == "took longer than 2 s"
    assert rows[1].parts == ({"good": 1.0, function: 0.0} if stays else None)
    assert [rows[i][function] for i in (0, 2)] == ([1, 1] if function == "nan" else [1, 3])
    assert ask(rewarder, ["ab"])[0]["good"] == 1, "the next group is scored"


@pytest.mark.parametrize(
    ("function", "reason"),
    [("forgets", "returned a NoneType for 1 completions"), ("too_few", "returned 1 scores for 2 completions")],
)
def test_a_wrong_result(make, function: str, reason: str) -> None:
    rows = ask(make(function), ["bad", "a"] if function == "too_few" else ["a", "b"])
    if function == "forgets":
        assert rows == [FailedReward(function, reason)] * 2
    else:
        assert rows == [{"too_few": 3.0}, {"too_few": 1.0}], "correct when called for one completion"


def test_each_answer_has_the_whole_limit(make) -> None:
    assert ask(make("half_a_second_each", timeout_s=1.0), ["a"] * 4) == [{"half_a_second_each": 1.0}] * 4


def test_answers_that_hang_are_scored_side_by_side(make) -> None:
    rewarder = make("hangs", timeout_s=1.0, num_processes=4)
    start = time.perf_counter()
    rows = ask(rewarder, ["bad"] * 4)
    assert [row.parts for row in rows] == [{"hangs": 0.0}] * 4
    assert time.perf_counter() - start < 4, "one limit for the group and one for its answers; 5 s one after another"


def test_the_score_of_an_answer_that_hangs_is_the_configs(modules: None) -> None:
    components = [{"_component_": "odd_rewards.hangs", "timeout_score": -1, "weight": 2}]
    rewarder = RewardProcesses(components, timeout_s=0.5, num_processes=1)
    good, bad = ask(rewarder, ["a", "bad"])
    assert (good, bad.parts) == ({"hangs": 1.0}, {"hangs": -1.0})
    assert rewarder.total(bad.parts) == -2
    rewarder.close()


def test_no_process_starts_after_close(make) -> None:
    rewarder = make("hangs", timeout_s=60)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            ask(rewarder, ["bad", "a"])
        except RolloutError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.3)
    rewarder.close()
    thread.join(timeout=30)
    assert "closed" in str(errors[0])


def test_a_config_that_names_no_function_is_refused_at_once(modules: None) -> None:
    with pytest.raises(ConfigError, match=r"odd_rewards.*goood"):
        RewardProcesses([{"_component_": "odd_rewards.goood"}], timeout_s=1, num_processes=1)
    Path("broken_rewards.py").write_text("raise RuntimeError('no weights here')")
    with pytest.raises(ConfigError, match=r"RuntimeError: no weights here \(.*broken_rewards.py, line 1\)"):
        RewardProcesses([{"_component_": "broken_rewards.f"}], timeout_s=1, num_processes=1)


def test_calls_run_side_by_side_and_a_fast_function_needs_one_process(make) -> None:
    rewarder = make("pid")
    assert len({row["pid"] for _ in range(20) for row in ask(rewarder, ["a", "b"])}) == 1
    start = time.perf_counter()
    for _ in range(100):
        ask(rewarder, ["x" * 200] * 16)
    assert (time.perf_counter() - start) / 100 < 0.02
    slow = make("slow", num_processes=4, timeout_s=5)
    threads = [threading.Thread(target=ask, args=(slow, ["a"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(slow._all) > 1


def test_nothing_is_left_after_close(make) -> None:
    rewarder = make("pid")
    (row,) = ask(rewarder, ["a"])
    rewarder.close()
    assert not Path(f"/proc/{int(row['pid'])}").exists()


def test_a_child_outlives_the_signals_that_ask_its_parent_to_stop(make) -> None:
    rewarder = make("pid", num_processes=1)
    (row,) = ask(rewarder, ["a"])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(int(row["pid"]), number)
    assert ask(rewarder, ["a"]) == [row]


def test_a_child_that_is_stopped_costs_a_time_limit(make) -> None:
    """As by SIGSTOP. The long question fills the pipe, and the child reads none of it."""
    rewarder = make("pid", timeout_s=1.0)
    (row,) = ask(rewarder, ["a"])
    os.kill(int(row["pid"]), signal.SIGSTOP)
    began = time.monotonic()
    rows = ask(rewarder, ["a" * 500_000, "b"])
    assert all(isinstance(each, dict) and each != row for each in rows) and time.monotonic() - began < 30
    assert not Path(f"/proc/{int(row['pid'])}").exists()


def test_a_child_that_is_killed_while_it_starts_is_started_again(make, tmp_path: Path) -> None:
    mark = tmp_path / "dies_at_its_next_start"
    dying = f"import os\nif os.path.exists({str(mark)!r}):\n    os.remove({str(mark)!r})\n    os._exit(9)\n"
    (tmp_path / "odd_rewards.py").write_text(dying + SOURCE)
    rewarder = make("pid")
    (row,) = ask(rewarder, ["a"])
    mark.touch()
    os.kill(int(row["pid"]), signal.SIGKILL)
    after = ask(rewarder, ["a", "b"])
    assert all(isinstance(each, dict) and each != row for each in after) and not mark.exists()


def test_a_child_ends_with_a_parent_that_was_killed(modules: None) -> None:
    import subprocess
    import sys

    code = (
        "from test_reward_processes import *; import sys\n"
        "r = RewardProcesses([{'_component_': 'odd_rewards.pid'}, {'_component_': 'odd_rewards.hangs'}],"
        " timeout_s=3600, num_processes=1)\n"
        "print(int(next(iter(r._all))._process.pid), flush=True)\n"
        "ask(r, ['bad'])\n"
    )
    path = os.pathsep.join(sys.path)
    env = {**os.environ, "PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# The effect on rollouts


def failing(group: Scored, number: int, name: str = "mine") -> Scored:
    """The group with `number` of its rollouts replaced by failures."""
    rollouts = group.rollouts[: len(group.rollouts) - number]
    return replace(group, rollouts=rollouts, failures=(FailedReward(name, "returned nan"),) * number)


class Engine:
    """Generates one-token completions."""

    def generate(self, requests):
        import numpy as np

        from tora.types import Completion

        one = (np.ones(1, np.int64), *[np.zeros(1, np.float32)] * 2, np.zeros(1, np.int64), True)
        return [[Completion(*one) for _ in range(r.num_samples)] for r in requests]

    def close(self) -> None: ...


class Decoder:
    def __init__(self) -> None:
        self.texts = iter(["a", "bad", "abc", "bad"])

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return next(self.texts)


@pytest.mark.parametrize("function", ["raises", "hangs"])
def test_a_worker_drops_the_rollouts_whose_reward_failed_and_keeps_those_that_hang(make, function: str) -> None:
    from tora.types import Sampling

    worker = RolloutWorker(
        Engine,  # type: ignore[arg-type]
        lambda: make(function, timeout_s=0.5, num_processes=2),
        Decoder(),
        sampling=Sampling(1),
        eval_sampling=Sampling(1),
        group_size=4,
        seed=0,
    )
    group = worker.run_group(PROMPT)
    hung = [("bad", 0.0)] if function == "hangs" else []
    assert [(r.text, r.reward) for r in group.rollouts] == [("a", 1.0), *hung, ("abc", 3.0), *hung]
    assert [f.name for f in group.failures] == [function] * 2
    assert group.with_prompt(PROMPT).num_left_out == (0 if hung else 2)
    worker.close()


def test_a_group_of_fewer_than_two_rollouts_is_dropped() -> None:
    signal = SignalFilter(config(0))
    whole = make_group(make_prompt(0), [0, 1, 1])
    assert signal.admit(failing(whole, 1))
    assert not signal.admit(failing(whole, 2))
    assert not signal.admit(failing(whole, 3))
    generated, drops = signal.drain()
    assert (len(generated), drops) == (3, 0), "not counted as dropped for equal rewards"


def test_a_failed_reward_does_not_count_as_correct() -> None:
    groups = [make_group(make_prompt(0), [1.0]), failing(make_group(make_prompt(1), [1.0]), 1)]
    result = summarize(groups, 1, passes_by("fake"))
    assert (result.accuracy, result.reward, result.num_prompts) == (0.5, 0.5, 2)


class Failing(FakeWorker):
    share = 0.25

    async def run_group(self, prompt: Prompt) -> GroupResult:
        return failing(await super().run_group(prompt), round(4 * self.share))


def hanging(group: Group, number: int) -> Group:
    """The reward of `number` of its rollouts took too long."""
    return replace(group, failures=(FailedReward("mine", "took longer than 1 s", {"mine": 0.0}),) * number)


def test_answers_that_hang_are_counted_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    signal = SignalFilter(config(0))
    groups = [hanging(make_group(make_prompt(i), [0, 0, 1, 1]), 1) for i in range(3)]
    assert all(signal.admit(group) for group in groups)
    batch = make_batch(config(0), groups, *signal.drain(), 0, 1.0)
    assert batch.metrics["reward/failed_share"] == 0.25
    assert batch.metrics["reward/failed/mine"] == 3
    assert sum(len(m.lengths_B) for m in batch.micro_batches) == 3 * 4
    assert caplog.messages == [
        "reward mine took longer than 1 s, for a rollout of prompt 0 ('question 0'), and scores 0"
    ]


def test_each_kind_of_failure_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """A second kind was hidden by the first of the same reward; a reason with a number of its own must not flood."""
    signal = SignalFilter(config(0))
    reasons = [
        "ended its process",
        "took longer than 1 s",
        "took longer than 2 s",
        *(f"raised {c}" for c in "abcdefghij"),
    ]
    for i, reason in enumerate(reasons):
        signal.admit(replace(make_group(make_prompt(i), [0, 1, 1]), failures=(FailedReward("mine", reason),)))
    named = [message.partition(", for")[0] for message in caplog.messages]
    assert named == [f"reward mine {reason}" for reason in [*reasons[:2], *reasons[3:11]]]


def test_answers_that_all_hang_end_the_run() -> None:
    signal = SignalFilter(config(0))
    with pytest.raises(RolloutError, match=r"rollouts failed, .* the last: reward mine took longer"):
        for i in range(100):
            signal.admit(hanging(make_group(make_prompt(i), [0, 0, 0, 0]), 4))


def badly_scored(group: Group, number: int) -> Group:
    """The engine returned nan as a log-prob in `number` of its rollouts."""
    bad = (BadLogprob(3, math.nan, 5),) * number
    return replace(group, rollouts=group.rollouts[number:], bad_logprobs=bad)


def test_bad_logprobs_are_counted_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    signal = SignalFilter(config(0))
    groups = [badly_scored(make_group(make_prompt(i), [0, 0, 1, 1]), 1) for i in range(3)]
    assert all(signal.admit(group) for group in groups)
    assert not signal.admit(badly_scored(make_group(make_prompt(3), [0, 0, 1, 1]), 3)), "one rollout is left"
    batch = make_batch(config(0), groups, *signal.drain(), 0, 1.0)
    assert batch.metrics["rollout/bad_logprobs"] == 6 and batch.metrics["reward/failed_share"] == 0
    assert sum(len(m.lengths_B) for m in batch.micro_batches) == 3 * 3
    named = "the engine's log-prob of token 3 is nan under policy version 5"
    assert caplog.messages == [f"{named}, for a rollout of prompt 0, which is left out"]
    with pytest.raises(RolloutError, match=f"rollouts failed, more than max_failed_rewards=0.5; the last: {named}$"):
        for i in range(100):
            signal.admit(badly_scored(make_group(make_prompt(i), [0, 0, 0, 0]), 4))


def test_failures_are_counted_and_too_many_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def rewards(prompt: Prompt) -> list[float]:
        return [0.0, 1.0, 0.0, 1.0]

    with running(config(0), lambda: Failing(rewards=rewards)) as rollouts:
        rollouts.publish(make_snapshot(0))
        batch = next_batch(rollouts, 0)
        assert batch.metrics["reward/failed_share"] == 0.25
        assert batch.metrics["reward/failed/mine"] == 4
        assert sum(len(m.lengths_B) for m in batch.micro_batches) == 4 * 3
        assert caplog.text.count("reward mine returned nan") == 1, "warned once"
        Failing.share = 1.0
        try:
            rollouts.publish(make_snapshot(1))
            with pytest.raises(
                RolloutError, match=r"rollouts failed, more than max_failed_rewards=0.5; the last: reward mine"
            ):
                next_batch(rollouts, 1)
        finally:
            Failing.share = 0.25
