"""A snapshot on its way to the workers while the next step runs, and prompts made beside the event loop."""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from fakes import FakeWorker, make_prompt, make_snapshot
from pools import QUICK, check_each_prompt_once, config, next_batch, pending, running, some_without_signal

from tora.batching.train_batch import make_batch
from tora.errors import OverlongPrompt, SyncError, WorkerLost
from tora.types import Prompt, RolloutState, SyncReport


class SlowToInstall(FakeWorker):
    def __init__(self, seconds: float) -> None:
        super().__init__(lambda: 0.002)
        self.seconds, self.began = seconds, list[tuple[int, int]]()

    async def forward(self, snapshot: Any) -> SyncReport:
        if snapshot.version:
            await asyncio.sleep(self.seconds)
        return await super().forward(snapshot)


def test_no_step_waits_for_a_worker_that_installs_slowly() -> None:
    workers = [SlowToInstall(0), SlowToInstall(0.5)]
    with running(config(1), iter(workers).__next__) as rollouts:
        rollouts.publish(make_snapshot(0))
        began = time.perf_counter()
        for step in range(4):
            assert next_batch(rollouts, step).metrics["staleness/max"] <= 1
            metrics = rollouts.publish(make_snapshot(step + 1))
        assert time.perf_counter() - began < 0.4 and workers[1].version < 4
        assert rollouts.logprobs([], adapter=True).keys() == {0, 1}
        assert [worker.version for worker in workers] == [4, 4], "log-probs are those of the newest version"
        assert workers[1].began == [] and metrics.keys() >= {"sync/seconds", "sync/workers"}


def test_a_run_begins_with_a_quorum_and_uses_the_late() -> None:
    class Late(FakeWorker):
        async def start(self, limit_s: float) -> None:
            await asyncio.sleep(0.4)

    workers = [FakeWorker(lambda: 0.005), Late(lambda: 0.005), Late(lambda: 0.005)]
    with running(config(1, workers=3, min_workers=1), iter(workers).__next__) as rollouts:
        began = time.perf_counter()
        rollouts.publish(make_snapshot(0))
        assert next_batch(rollouts, 0).metrics["rollout/workers"] == 1 and time.perf_counter() - began < 0.4
        step = 0
        while not workers[1].prompt_ids and time.perf_counter() - began < 5:
            step += 1
            rollouts.publish(make_snapshot(step))
            metrics = next_batch(rollouts, step).metrics
        assert metrics["rollout/workers"] == 3 and workers[1].prompt_ids


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("dies", [False, True])
def test_staleness_holds_whatever_the_workers_have(bound: int, dies: bool) -> None:
    """Each worker installs in its own time, and some are lost meanwhile."""
    rng = random.Random(bound)

    class Uneven(FakeWorker):
        async def forward(self, snapshot: Any) -> SyncReport:
            await asyncio.sleep(rng.choice([0, 0.001, 0.01]))
            if dies and snapshot.version > 3 and rng.random() < 0.05:
                raise WorkerLost("killed")
            return await super().forward(snapshot)

    trained: list[int] = []
    make = lambda: Uneven(lambda: rng.expovariate(500), some_without_signal)  # noqa: E731
    with running(config(bound, workers=4), make, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        for step in range(40):
            batch = next_batch(rollouts, step)
            assert batch.metrics["staleness/max"] <= bound
            trained += batch.prompt_ids
            rollouts.publish(make_snapshot(step + 1))
        check_each_prompt_once(trained, rollouts.state())


def test_a_snapshot_that_arrives_wrong_ends_the_run_at_the_next_call() -> None:
    class Wrong(FakeWorker):
        async def forward(self, snapshot: Any) -> SyncReport:
            if snapshot.version == 2:
                raise SyncError("half of it")
            return await super().forward(snapshot)

    with running(config(1), Wrong) as rollouts, pytest.raises(SyncError, match="half of it"):
        for step in range(4):
            rollouts.publish(make_snapshot(step))
            next_batch(rollouts, step)


def test_after_a_rewind_no_group_runs_under_the_lost_history() -> None:
    workers = [SlowToInstall(0.1), SlowToInstall(0.1)]
    with running(config(3), iter(workers).__next__) as rollouts:
        for step in range(3):
            rollouts.publish(make_snapshot(step))
            next_batch(rollouts, step)
        rollouts.rewind(RolloutState(), 1)
        rollouts.publish(make_snapshot(1))
        assert [worker.version for worker in workers] == [1, 1], "it waits for all"
        assert next_batch(rollouts, 1).metrics["staleness/max"] == 0


def slow_prompt(number: int) -> Prompt:
    time.sleep(0.02)
    if number % 5 == 4:
        raise OverlongPrompt("too long")
    return make_prompt(number)


def test_prompts_that_take_long_do_not_block_the_event_loop() -> None:
    """128 prompts of 50 ms blocked it for 6.4 s, heartbeats included."""
    gaps: list[float] = []

    class Beating(FakeWorker):
        async def run_group(self, prompt: Prompt) -> Any:
            began = time.perf_counter()
            await asyncio.sleep(0.01)
            gaps.append(time.perf_counter() - began)
            return await super().run_group(prompt)

    trained: list[int] = []
    with running(config(1, batch_size=8), Beating, prompt_at=slow_prompt) as rollouts:
        rollouts.publish(make_snapshot(0))
        dropped = 0.0
        for step in range(4):
            batch = next_batch(rollouts, step)
            trained += batch.prompt_ids
            dropped += batch.metrics["rollout/prompts_dropped"]
            rollouts.publish(make_snapshot(step + 1))
        state = rollouts.state()
    assert sorted(gaps)[len(gaps) // 2] < 0.02, "a prompt takes longer"
    assert dropped > 0 and all(number % 5 != 4 for number in trained)
    assert set(trained) | pending(state) >= {n for n in range(state.cursor) if n % 5 != 4}, "none lost"
    assert not set(trained) & pending(state)


def test_a_batch_that_takes_long_does_not_block_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeats of 256 workers cannot wait for a batch of images."""
    gaps: list[float] = []

    class Watched(FakeWorker):
        async def occupancy(self) -> Any:
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            gaps.append(time.perf_counter() - began)
            return await super().occupancy()

    def slowly(*args: Any, **keys: Any) -> Any:
        time.sleep(0.4)
        return make_batch(*args, **keys)

    monkeypatch.setattr("actors.pool.make_batch", slowly)
    with running(config(1), Watched, timing=QUICK) as rollouts:
        for step in range(2):
            rollouts.publish(make_snapshot(step))
            next_batch(rollouts, step)
    assert len(gaps) > 10 and max(gaps) < 0.35


def test_prompts_come_in_order_and_a_bad_row_ends_the_run() -> None:
    def prompt_at(number: int) -> Prompt:
        if number == 20:
            raise OSError("the row is unreadable")
        return make_prompt(number)

    worker, trained = FakeWorker(), list[int]()
    with running(config(1, workers=1), lambda: worker, prompt_at=prompt_at, state=RolloutState(9, [7, 2])) as rollouts:
        with pytest.raises(OSError, match="unreadable"):
            for step in range(9):
                rollouts.publish(make_snapshot(step))
                trained += next_batch(rollouts, step).prompt_ids
        state = rollouts.state()
    assert {2, 7, *range(9, state.cursor)} <= {*trained, *pending(state)}, "none is lost"
    assert state.cursor <= 20 or 20 in state.pending, "its turn comes again"
    started: Sequence[int] = worker.prompt_ids
    assert list(started) == [2, 7, *range(9, 20)][: len(started)] and len(started) >= 8
