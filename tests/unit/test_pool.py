"""The pool with fake workers: staleness, faults, load balance, and what a resumed run starts from."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeWorker, make_group, make_prompt, make_snapshot
from pools import QUICK, config, next_batch, running

from actors.buffer import in_time
from actors.concurrency import adapted
from actors.seat import SeatTiming, WorkerHandle
from tora.errors import ConfigError, RolloutError, SyncError, WorkerLost
from tora.run.group_files import load_groups, save_groups
from tora.types import Group, GroupResult, Occupancy, Prompt, RolloutState, SyncReport


def pending(state: RolloutState) -> set[int]:
    """Prompts that are neither trained nor dropped."""
    return {*state.pending, *(group.prompt.id for _, group in state.finished)}


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_under_random_latencies(bound: int) -> None:
    rng = random.Random(bound)
    workers = [
        FakeWorker(lambda: rng.expovariate(400), lambda p: [0.0, 1.0] if p.id % 3 else [1.0, 1.0]) for _ in range(2)
    ]
    with running(config(bound), iter(workers).__next__) as rollouts:
        rollouts.publish(make_snapshot(0))
        worst = 0.0
        for step in range(30):
            batch = next_batch(rollouts, step)
            assert batch.metrics["staleness/max"] <= bound
            worst = max(worst, batch.metrics["staleness/max"])
            assert sum(len(m.lengths_B) for m in batch.micro_batches) == 4 * 2, "dropped groups are refilled"
            rollouts.publish(make_snapshot(step + 1))
        assert worst == bound, "it does run ahead where it may"
        assert rollouts.evaluate().accuracy == pytest.approx(2 / 5)
        state = rollouts.state()
        ids = [i for w in workers for i in w.prompt_ids]
        assert len(ids) == len(set(ids)), "no prompt twice"
        started = set(ids) | pending(state)  # read after the state: the workers may have begun some more
        assert set(range(state.cursor)) <= started, "no prompt lost"
    assert all(w.closed for w in workers)


def test_it_resumes_where_it_stood() -> None:
    worker = FakeWorker()
    resumed = RolloutState(50, [7, 9])
    with running(config(0, workers=1), lambda: worker, state=resumed, version=12) as rollouts:
        rollouts.publish(make_snapshot(12))
        next_batch(rollouts, 12)
        assert worker.prompt_ids[:4] == [7, 9, 50, 51]


class MortalWorker(FakeWorker):
    """Fails in the ways that real ones do. Once it is dead, whatever was in flight fails with it."""

    def __init__(self, fault: str | None, latency: Any, rewards: Any) -> None:
        super().__init__(latency, rewards)
        self.fault, self.calls, self.dead = fault, 0, asyncio.Event()

    async def run_group(self, prompt: Prompt) -> GroupResult:
        self.calls += 1
        if self.calls > 3:
            match self.fault:
                case "crash":
                    self.dead.set()
                case "broken engine":
                    raise RolloutError("the engine's thread ended")
                case "out of memory":
                    raise MemoryError("no memory")
                case "hang":
                    await asyncio.sleep(3600)
        group = asyncio.ensure_future(super().run_group(prompt))
        dead = asyncio.ensure_future(self.dead.wait())
        try:
            await asyncio.wait({group, dead}, return_when=asyncio.FIRST_COMPLETED)
            if self.dead.is_set():
                raise WorkerLost("killed")
            return group.result()
        finally:
            dead.cancel()
            group.cancel()

    async def forward(self, snapshot: Any) -> SyncReport:
        if self.fault == "crash at a sync" and snapshot.version % 4 == 3:
            self.dead.set()
            raise WorkerLost("killed")
        return await super().forward(snapshot)

    async def occupancy(self) -> Occupancy:
        if self.fault == "frozen" and self.calls > 3:
            await asyncio.sleep(3600)
        return Occupancy()


FAULTS = ["crash", "broken engine", "out of memory", "hang", "crash at a sync", "frozen"]


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("fault", [*FAULTS, "any"])
def test_no_group_is_lost_or_trained_twice_whatever_dies(bound: int, fault: str) -> None:
    rng = random.Random(f"{bound}{fault}")
    workers: list[MortalWorker] = []

    def make() -> WorkerHandle:
        kind = None if not workers else rng.choice(FAULTS) if fault == "any" else fault
        workers.append(MortalWorker(kind, lambda: rng.expovariate(1000), lambda p: [0.0, 1.0] if p.id % 3 else [1, 1]))
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
        assert len(trained) == len(set(trained)) == (step + 1) * 4, "none twice"
        assert not set(trained) & pending(state)
        without_signal = {i for i in range(state.cursor) if i % 3 == 0}
        assert set(trained) | pending(state) | without_signal >= set(range(state.cursor)), "none lost"


class InFlightWorker(FakeWorker):
    """Its tokens are of every version that it was given while they were sampled."""

    async def run_group(self, prompt: Prompt) -> GroupResult:
        began = self.version
        group = await super().run_group(prompt)
        versions = [np.linspace(began, self.version, len(r.token_ids)).astype(np.int64) for r in group.rollouts]
        mixed = tuple(replace(r, versions=v) for r, v in zip(group.rollouts, versions, strict=True))
        return replace(group, rollouts=mixed)


def test_the_oldest_token_of_a_mixed_rollout_keeps_the_bound() -> None:
    rng = random.Random(0)
    with running(config(2), lambda: InFlightWorker(lambda: rng.expovariate(300))) as rollouts:
        rollouts.publish(make_snapshot(0))
        mixed = 0.0
        for step in range(30):
            batch = next_batch(rollouts, step)
            versions_N = np.concatenate([m.versions_N for m in batch.micro_batches])
            assert batch.metrics["staleness/max"] == step - versions_N.min() <= 2
            mixed += batch.metrics["rollout/mixed_share"]
            rollouts.publish(make_snapshot(step + 1))
        assert mixed > 0


def test_publish_waits_for_no_worker_that_is_dead_or_starting() -> None:
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
            sync = rollouts.publish(make_snapshot(step + 1))
            assert time.perf_counter() - began < 1
        assert sync["sync/workers"] == 1
        assert first[1].version == 4


def test_a_worker_that_starts_loads_the_newest_snapshot_before_its_first_group() -> None:
    class Late(FakeWorker):
        async def start(self, limit_s: float) -> None:
            await asyncio.sleep(0.05)

        async def forward(self, snapshot: Any) -> SyncReport:
            await asyncio.sleep(0.02)  # long enough for a newer one to come out meanwhile, now and then
            return await super().forward(snapshot)

    made = [MortalWorker("crash", lambda: 0.002, lambda p: [0.0, 1.0]), FakeWorker(lambda: 0.002), Late(), Late()]
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
def test_what_a_new_worker_would_fail_at_too_ends_the_run(error: Exception) -> None:
    class Wrong(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            raise error

    with running(config(1), Wrong) as rollouts:
        rollouts.publish(make_snapshot(0))
        with pytest.raises(type(error), match=str(error)):
            next_batch(rollouts, 0)


def test_an_evaluation_survives_its_worker() -> None:
    class Dying(FakeWorker):
        async def evaluate(self, prompts: Sequence[Prompt]) -> list[GroupResult]:
            raise WorkerLost("killed")

    made = [Dying(), FakeWorker(), FakeWorker()]
    with running(config(1), iter(made).__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        result = rollouts.evaluate()
        assert (result.num_prompts, result.accuracy) == (5, pytest.approx(2 / 5))


def test_a_worker_may_join_a_running_job() -> None:
    has_room = threading.Event()

    class Waiting(FakeWorker):
        async def start(self, limit_s: float) -> None:
            while not has_room.is_set():
                await asyncio.sleep(0.001)

    made = [FakeWorker(lambda: 0.001), Waiting(lambda: 0.001)]
    with running(config(1, workers=1, max_workers=2), iter(made).__next__) as rollouts:
        rollouts.publish(make_snapshot(0))
        assert next_batch(rollouts, 0).metrics["rollout/workers"] == 1
        has_room.set()
        for step in range(1, 200):
            rollouts.publish(make_snapshot(step))
            next_batch(rollouts, step)
            if made[1].prompt_ids:
                break
        assert made[1].prompt_ids and made[1].version > 0


def test_a_slot_goes_to_the_worker_that_owes_the_fewest_tokens() -> None:
    class Counting(FakeWorker):
        owed = most = 0

        async def run_group(self, prompt: Prompt) -> GroupResult:
            self.owed += len(prompt.token_ids)
            self.most = max(self.most, self.owed)
            try:
                return await super().run_group(prompt)
            finally:
                self.owed -= len(prompt.token_ids)

    workers = [Counting(lambda: 0.01), Counting(lambda: 0.01)]
    cfg = config(0, batch_size=5, concurrency=8)
    lengths = [9000, 2000, 2000, 2000, 2000]
    with running(cfg, iter(workers).__next__, prompt_at=lambda i: make_prompt(i, lengths[i % 5])) as rollouts:
        rollouts.publish(make_snapshot(0))
        next_batch(rollouts, 0)
    assert sorted(w.most for w in workers) == [8000, 9000]
    assert sorted(len(w.prompt_ids) for w in workers) == [1, 4]


def test_concurrency_follows_the_kv_cache() -> None:
    assert adapted(8, 16, 8, Occupancy(0.5)) == 9
    assert adapted(16, 16, 16, Occupancy(0.5)) == 16
    assert adapted(8, 16, 3, Occupancy(0.5)) == 8, "nothing waits for a higher bound"
    assert adapted(8, 16, 8, Occupancy(0.9)) == 8
    assert adapted(8, 16, 8, Occupancy(0.99)) == 6
    assert adapted(8, 16, 4, Occupancy(0.5, preemptions=2)) == 3
    assert adapted(1, 16, 1, Occupancy(1.0, preemptions=9)) == 1


def test_a_full_cache_gets_fewer_groups() -> None:
    class Small(FakeWorker):
        """Room for 3 groups."""

        running = 0
        overflows: list[bool]

        async def run_group(self, prompt: Prompt) -> GroupResult:
            self.running += 1
            self.overflows.append(self.running > 3)
            try:
                return await super().run_group(prompt)
            finally:
                self.running -= 1

        async def occupancy(self) -> Occupancy:
            return Occupancy(min(1.0, self.running / 3), max(0, self.running - 3))

    worker = Small(lambda: 0.03)
    worker.overflows = []
    with running(config(1, workers=1, concurrency=16, batch_size=16), lambda: worker, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        for step in range(6):
            next_batch(rollouts, step)
            rollouts.publish(make_snapshot(step + 1))
    early, late = worker.overflows[:16], worker.overflows[-32:]
    assert sum(early) > 8 and sum(late) < 12


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_an_interrupted_run_and_its_successor_train_each_prompt_once(bound: int, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)

    def make() -> FakeWorker:
        return FakeWorker(lambda: rng.expovariate(500), lambda p: [0.0, 1.0] if p.id % 3 else [1.0, 1.0])

    trained: list[int] = []
    state, step = RolloutState(), 0
    for _ in range(3):  # runs, each going on where the one before was interrupted
        with running(config(bound), make, state=state, version=step) as rollouts:
            rollouts.publish(make_snapshot(step))
            for _ in range(rng.randint(1, 6)):
                batch = next_batch(rollouts, step)
                assert 0 <= batch.metrics["staleness/max"] <= bound
                assert batch.metrics["reward/mean"] >= 0
                trained += batch.prompt_ids
                step += 1
                rollouts.publish(make_snapshot(step))
            state = rollouts.state()
        folder = tmp_path / str(step)
        folder.mkdir()
        save_groups(folder, state.finished)
        before = state.finished
        state = RolloutState(state.cursor, state.pending, load_groups(folder, make_prompt))
        check_same(before, state.finished)
    assert len(trained) == len(set(trained)) == step * 4, "none twice"
    dropped = {i for i in range(state.cursor) if i % 3 == 0}
    assert set(trained) | pending(state) | dropped >= set(range(state.cursor)), "none lost"
    assert not set(trained) & pending(state)


def check_same(a: Sequence[tuple[int, Group]], b: Sequence[tuple[int, Group]]) -> None:
    assert [(born, group.prompt, group.seconds) for born, group in a] == [(n, g.prompt, g.seconds) for n, g in b]
    for (_, one), (_, other) in zip(a, b, strict=True):
        for x, y in zip(one.rollouts, other.rollouts, strict=True):
            assert all(np.array_equal(getattr(x, f.name), getattr(y, f.name)) for f in fields(x))


def test_groups_of_another_dataset_are_refused(tmp_path: Path) -> None:
    save_groups(tmp_path, [(0, make_group(make_prompt(3), [0, 1]))])
    with pytest.raises(ConfigError, match="another dataset"):
        load_groups(tmp_path, lambda i: make_prompt(i, length=4))


def test_a_smaller_bound_generates_again_what_would_come_too_late() -> None:
    finished = [(born, make_group(make_prompt(i), [0, 1], born)) for i, born in enumerate([4, 4, 5, 6, 6])]
    good, late = in_time(finished, 2, 2, 6)
    assert (len(good), late) == (5, [])
    good, late = in_time(finished, 2, 1, 6)
    assert [g.prompt.id for _, g in good] == [2, 3, 4] and [g.prompt.id for _, g in late] == [0, 1]
    worker = FakeWorker()
    state = RolloutState(5, [], finished)
    with running(config(1, workers=1, batch_size=2), lambda: worker, state=state, version=6) as rollouts:
        rollouts.publish(make_snapshot(6))
        assert next_batch(rollouts, 6).prompt_ids == (2, 3)
        rollouts.publish(make_snapshot(7))
        next_batch(rollouts, 7)
        assert worker.prompt_ids[:3] == [0, 1, 5]


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_goes_back_trains_each_prompt_once_in_the_history_that_survives(bound: int, seed: int) -> None:
    rng = random.Random(seed)
    workers = [FakeWorker(lambda: rng.expovariate(500), lambda p: [0.0, 1.0] if p.id % 3 else [1, 1]) for _ in range(2)]
    with running(config(bound), iter(workers).__next__) as rollouts:
        history: dict[int, tuple[int, ...]] = {}
        saved, step = (0, RolloutState()), 0
        rollouts.publish(make_snapshot(0))
        while step < 25:
            batch = next_batch(rollouts, step)
            assert 0 <= batch.metrics["staleness/max"] <= bound, "no group of a version that was taken back"
            history[step] = batch.prompt_ids
            step += 1
            if rng.random() < 0.2:  # the learner is lost in its step or after it
                step, state = saved
                rollouts.rewind(state, step)
            rollouts.publish(make_snapshot(step))
            if rng.random() < 0.3:
                saved = (step, rollouts.state())
        state = rollouts.state()
        trained = [i for ids in history.values() for i in ids]
        assert len(trained) == len(set(trained)) == 25 * 4
        dropped = {i for i in range(state.cursor) if i % 3 == 0}
        assert set(trained) | pending(state) | dropped >= set(range(state.cursor))
        assert not set(trained) & pending(state)


def test_a_stop_ends_the_wait_for_rollouts() -> None:
    with running(config(1), lambda: FakeWorker(lambda: 0.5)) as rollouts:
        rollouts.publish(make_snapshot(0))
        began = time.perf_counter()
        assert rollouts.next_batch(0, lambda: True) is None
        assert time.perf_counter() - began < 0.45
        assert rollouts.state().pending == [0, 1, 2, 3, 4, 5], "what was in flight is generated again"


def test_restart_delays_grow_to_a_minute() -> None:
    assert [SeatTiming().restart_delay_s(n) for n in (0, 1, 2, 10, 10_000)] == [1, 2, 4, 60, 60]
