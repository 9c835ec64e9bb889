"""The pool with workers that die, hang or break."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pytest
from fakes import FakeWorker, make_snapshot
from pools import (
    FAULTS,
    QUICK,
    MortalWorker,
    check_each_prompt_once,
    config,
    evaluate,
    next_batch,
    running,
    some_without_signal,
)

from actors.seat import SeatTiming, WorkerHandle
from tora.errors import ImageLost, LearnerLost, RolloutError, SnapshotLost, SyncError, WorkerLost
from tora.protocols import Occupancy
from tora.types import GroupResult, LogprobRequest, Prompt, RolloutState, SyncReport


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("fault", [*FAULTS, "any"])
def test_no_group_is_lost_or_trained_twice_whatever_dies(bound: int, fault: str) -> None:
    rng = random.Random(f"{bound}{fault}")
    workers: list[MortalWorker] = []

    def make() -> WorkerHandle:
        kind = None if not workers else rng.choice(FAULTS) if fault == "any" else fault
        workers.append(MortalWorker(kind, lambda: rng.expovariate(1000), some_without_signal))
        return workers[-1]

    with running(
        config(bound, workers=3, group_timeout_s=0.1, heartbeat_s=0.1, max_restarts=50), make, timing=QUICK
    ) as rollouts:
        rollouts.publish(make_snapshot(0))
        trained: list[int] = []
        for step in count():
            batch = next_batch(rollouts, step)
            assert 0 <= batch.metrics["staleness/mean"] <= batch.metrics["staleness/max"] <= bound
            trained += batch.prompt_ids
            rollouts.publish(make_snapshot(step + 1))
            if step >= 25 and batch.metrics["rollout/workers_lost"] >= 3:
                break
        state = rollouts.state()
        assert len(trained) == (step + 1) * 4
        check_each_prompt_once(trained, state)


def test_a_worker_whose_images_are_lost_stays_and_the_group_runs_again() -> None:
    class Unlucky(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            result = await super().run_group(prompt)
            if prompt.id % 3 == 0 and self.prompt_ids.count(prompt.id) == 1:
                raise ImageLost("images are lost")
            return result

    with running(config(1, workers=1), Unlucky, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        trained: list[int] = []
        for step in range(3):
            batch = next_batch(rollouts, step)
            trained += batch.prompt_ids
            rollouts.publish(make_snapshot(step + 1))
        assert batch.metrics["rollout/workers_lost"] == 0 < batch.metrics["rollout/groups_rerun"]
        check_each_prompt_once(trained, rollouts.state())


def test_publish_does_not_wait_for_dead_or_starting_workers() -> None:
    class Slow(FakeWorker):
        async def start(self, limit_s: float) -> None:
            await asyncio.sleep(3600)

    first = [MortalWorker("crash", lambda: 0.001, lambda p: [0.0, 1.0]), FakeWorker(lambda: 0.001)]
    made = iter([*first, Slow()])
    with running(config(1), made.__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        for step in range(4):
            next_batch(rollouts, step)
            began = time.perf_counter()
            rollouts.publish(make_snapshot(step + 1))
            assert time.perf_counter() - began < 1
        assert rollouts.logprobs([], adapter=True) == {1: []}, "which waits until all workers have the snapshot"
        assert first[1].version == 4
        next_batch(rollouts, 4)
        assert rollouts.publish(make_snapshot(5))["sync/workers"] == 1


def test_a_worker_that_starts_loads_the_newest_snapshot_before_its_first_group() -> None:
    class Late(FakeWorker):
        async def start(self, limit_s: float) -> None:
            await asyncio.sleep(0.05)

        async def forward(self, snapshot: Any) -> SyncReport:
            await asyncio.sleep(0.02)  # long enough that a newer snapshot is sometimes published meanwhile
            return await super().forward(snapshot)

    # the one that stays is too slow for all of the work
    made = [MortalWorker("crash", lambda: 0.002, lambda p: [0.0, 1.0]), FakeWorker(lambda: 0.03), Late(), Late()]
    with running(config(1), iter(made).__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        for step in range(60):
            assert next_batch(rollouts, step).metrics["staleness/max"] <= 1
            time.sleep(0.03)
            rollouts.publish(make_snapshot(step + 1))
            if made[2].prompt_ids:
                break
        assert made[2].prompt_ids and made[2].version >= step


def test_workers_that_keep_dying_end_the_run_with_a_reason() -> None:
    class Doomed(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            raise WorkerLost("killed by the kernel")

    with running(config(1, max_restarts=3), Doomed, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        with pytest.raises(RolloutError, match=r"4 rollout workers were lost in a row.*killed by the kernel"):
            next_batch(rollouts, 0)


def test_a_worker_that_does_not_start_ends_the_run_at_once_with_the_cause() -> None:
    class Unstartable(FakeWorker):
        async def start(self, limit_s: float) -> None:
            raise RolloutError("vLLM did not start: no such kernel")

    with running(config(1), Unstartable) as rollouts, pytest.raises(RolloutError, match="no such kernel"):
        rollouts.publish(make_snapshot(0))


@pytest.mark.parametrize("error", [SyncError("half of it"), ValueError("a prompt is empty")])
def test_an_error_that_a_new_worker_would_repeat_ends_the_run(error: Exception) -> None:
    class Wrong(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            raise error

    with running(config(1), Wrong) as rollouts:
        rollouts.publish(make_snapshot(0))
        with pytest.raises(type(error), match=str(error)):
            next_batch(rollouts, 0)


def test_an_evaluation_survives_its_worker() -> None:
    class Dying(FakeWorker):
        async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
            raise WorkerLost("killed")

    made = [Dying(), FakeWorker(), FakeWorker()]
    with running(config(1), iter(made).__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        assert [group.rollouts[0].reward for group in evaluate(rollouts)] == [0, 1, 0, 1, 0]


def test_restart_delays_grow_to_a_minute() -> None:
    assert [SeatTiming().restart_delay_s(n) for n in (0, 1, 2, 10, 10_000)] == [1, 2, 4, 60, 60]


@pytest.mark.parametrize("wait", ["publish", "evaluate", "logprobs"])
def test_a_stop_ends_every_wait(wait: str) -> None:
    stop = threading.Event()

    class Endless(FakeWorker):
        async def forward(self, snapshot: Any) -> SyncReport:
            if snapshot.version:
                stop.set()
                await asyncio.sleep(3600)
            return await super().forward(snapshot)

        async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
            stop.set()
            await asyncio.sleep(3600)
            return []

        async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]:
            stop.set()
            await asyncio.sleep(3600)
            return []

    with running(config(1), Endless, stop_requested=stop.is_set) as rollouts:
        rollouts.publish(make_snapshot(0))
        while not rollouts.state().cursor:
            time.sleep(0.01)
        began = time.perf_counter()
        match wait:
            case "publish":  # which waits for all workers after a rewind
                rollouts.rewind(rollouts.state(), 0)
                assert rollouts.publish(make_snapshot(1)) == {}
            case "evaluate":
                assert evaluate(rollouts) is None
            case "logprobs":
                assert rollouts.logprobs([], adapter=True) == {}
        assert time.perf_counter() - began < 2
        state = rollouts.state()
        assert state.cursor > 0 and len(state.pending) + len(state.finished) == state.cursor


def test_losses_do_not_end_a_run_while_a_worker_is_up() -> None:
    class Doomed(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            raise WorkerLost("its node is gone")

    healthy = iter([FakeWorker(lambda: 0.01)])
    with running(config(1, max_restarts=1, workers=4), lambda: next(healthy, None) or Doomed(), timing=QUICK) as pool:
        pool.publish(make_snapshot(0))
        for step in range(10):
            batch = next_batch(pool, step)
            pool.publish(make_snapshot(step + 1))
        assert batch.metrics["rollout/workers_lost"] > 8


def test_a_worker_that_does_not_close_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(FakeWorker):
        async def close(self) -> None:
            raise RuntimeError("its socket is gone")

    workers = [Stubborn(), FakeWorker()]
    with running(config(1), iter(workers).__next__) as rollouts:
        rollouts.publish(make_snapshot(0))
    assert "rollout worker 0 did not close: its socket is gone" in caplog.text and workers[1].closed


def test_a_hung_engine_step_is_noticed_though_the_worker_answers() -> None:
    class Hung(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            await asyncio.sleep(3600)
            return await super().run_group(prompt)

        async def occupancy(self) -> Occupancy:
            return Occupancy(step_seconds=0.2)

    healthy = FakeWorker()
    with running(config(1, workers=1, heartbeat_s=0.1), iter([Hung(), healthy]).__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        began = time.perf_counter()
        assert next_batch(rollouts, 0).metrics["rollout/workers_lost"] == 1 and time.perf_counter() - began < 5


class Fetching(FakeWorker):
    """Cannot load the snapshots whose versions are `gone`, as after the loss of the learner's node."""

    gone: ClassVar[set[int]] = set()

    async def forward(self, snapshot: Any) -> SyncReport:
        if snapshot.version in self.gone:
            raise SnapshotLost(f"policy version {snapshot.version} is lost")
        return await super().forward(snapshot)


@pytest.mark.parametrize("first", [True, False])
def test_a_snapshot_that_went_with_its_learner_costs_no_worker(first: bool) -> None:
    """The call that waits for rollouts raises LearnerLost, and the workers serve the new learner."""
    workers: list[Fetching] = []

    def make() -> WorkerHandle:
        workers.append(Fetching(lambda: 0.001))
        return workers[-1]

    with running(config(1, max_restarts=0), make, timing=QUICK) as rollouts:
        Fetching.gone = {*range(9)} if first else {*range(1, 9)}
        for version in range(9):  # a batch of the version before may be ready
            try:
                rollouts.publish(make_snapshot(version))
                next_batch(rollouts, version)
            except LearnerLost:
                break
        else:
            pytest.fail("nobody noticed")
        Fetching.gone = set()
        rollouts.rewind(RolloutState(), 0)
        rollouts.publish(make_snapshot(0))
        for step in range(5):
            assert next_batch(rollouts, step).metrics["rollout/workers_lost"] == 0
            rollouts.publish(make_snapshot(step + 1))
        assert rollouts.logprobs([], adapter=True).keys() == {0, 1}, "all workers have the newest snapshot"
        assert len(workers) == 2 and all(worker.version == 5 for worker in workers)


def test_a_lost_snapshot_is_nobodys_after_a_rewind() -> None:
    """A worker that starts between two learners would give the second one up for the first one's snapshot."""
    may_start = threading.Event()

    class Late(Fetching):
        async def start(self, limit_s: float) -> None:
            while not may_start.is_set():
                await asyncio.sleep(0.01)

    made = iter([Fetching(), Fetching(), Late()])
    with running(config(0, max_workers=3), made.__next__, timing=QUICK) as rollouts:
        Fetching.gone = set()
        rollouts.publish(make_snapshot(0))
        next_batch(rollouts, 0)
        Fetching.gone = {1}
        rollouts.publish(make_snapshot(1))
        with pytest.raises(LearnerLost):
            next_batch(rollouts, 1)
        rollouts.rewind(RolloutState(), 0)
        may_start.set()
        time.sleep(0.3)
        Fetching.gone = set()
        rollouts.publish(make_snapshot(0))
        for step in range(100):
            workers = next_batch(rollouts, step).metrics["rollout/workers"]
            rollouts.publish(make_snapshot(step + 1))
            if workers == 3:
                break
            time.sleep(0.02)
        assert workers == 3, "the late one too, with the new learner's"


def test_a_learner_is_missed_when_it_goes_with_all_workers() -> None:
    """Whoever waits for rollouts would otherwise wait for ever: no new worker can load the newest snapshot."""

    class Last(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            if self.version == 1:
                raise WorkerLost("its node is gone")
            return await super().run_group(prompt)

    Fetching.gone, last = {1}, iter([Last()])
    with running(config(0, workers=1), lambda: next(last, None) or Fetching(), timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        next_batch(rollouts, 0)
        rollouts.publish(make_snapshot(1))
        with pytest.raises(LearnerLost, match="the node that held its newest policy is gone"):
            next_batch(rollouts, 1)


def test_a_wait_for_workers_that_find_no_room_ends_with_the_learner() -> None:
    """Its node went with theirs, and nothing calls it. The new learner's first batch is the old one's."""
    found_room, lost = threading.Event(), threading.Event()

    class Homeless(FakeWorker):
        async def start(self, limit_s: float) -> None:
            while not found_room.is_set():
                await asyncio.sleep(0.01)

    class Leaving(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            lost.set()
            raise WorkerLost("its node is gone")

    def check_learner() -> None:
        if lost.is_set() and not found_room.is_set():
            raise LearnerLost("one of its ranks died")

    last = iter([Leaving()])
    cfg = config(0, workers=1)
    with running(cfg, lambda: next(last, None) or Homeless(), timing=QUICK, watch=check_learner) as rollouts:
        rollouts.publish(make_snapshot(0))
        with pytest.raises(LearnerLost, match="one of its ranks died"):
            next_batch(rollouts, 0)
        rollouts.rewind(RolloutState(), 0)
        found_room.set()
        rollouts.publish(make_snapshot(0))
        assert next_batch(rollouts, 0).prompt_ids == (0, 1, 2, 3)
