"""The pool with fake workers: the staleness bound, which worker gets a group, workers that join, and a stop."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeWorker, make_prompt, make_snapshot
from pools import (
    config,
    evaluate,
    next_batch,
    pending,
    running,
    some_without_signal,
)

from tora.types import GroupResult, Prompt


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_under_random_latencies(bound: int) -> None:
    rng = random.Random(bound)
    workers = [FakeWorker(lambda: rng.expovariate(400), some_without_signal) for _ in range(2)]
    with running(config(bound), iter(workers).__next__) as rollouts:
        rollouts.publish(make_snapshot(0))
        worst = 0.0
        for step in range(30):
            batch = next_batch(rollouts, step)
            assert batch.metrics["staleness/max"] <= bound
            worst = max(worst, batch.metrics["staleness/max"])
            assert sum(len(m.lengths_B) for m in batch.micro_batches) == 4 * 2, "dropped groups are refilled"
            rollouts.publish(make_snapshot(step + 1))
        assert worst == bound, "it runs as far ahead as allowed"
        assert [g.rollouts[0].reward for g in evaluate(rollouts)] == [0, 1, 0, 1, 0], "in the prompts' order"
        state = rollouts.state()
        ids = [i for w in workers for i in w.prompt_ids]
        assert len(ids) == len(set(ids)), "no prompt twice"
        started = set(ids) | pending(state)  # read after the state: workers may have started more meanwhile
        assert set(range(state.cursor)) <= started, "no prompt lost"
    assert all(w.closed for w in workers)


class InFlightWorker(FakeWorker):
    """Its rollouts have tokens of every version that arrives while they are sampled."""

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


def test_a_slot_goes_to_the_worker_with_the_fewest_outstanding_tokens() -> None:
    class Counting(FakeWorker):
        outstanding = most = 0

        async def run_group(self, prompt: Prompt) -> GroupResult:
            self.outstanding += len(prompt.token_ids)
            self.most = max(self.most, self.outstanding)
            try:
                return await super().run_group(prompt)
            finally:
                self.outstanding -= len(prompt.token_ids)

    workers = [Counting(lambda: 0.01), Counting(lambda: 0.01)]
    cfg = config(0, batch_size=5, concurrency=8)
    lengths = [9000, 2000, 2000, 2000, 2000]
    with running(cfg, iter(workers).__next__, prompt_at=lambda i: make_prompt(i, lengths[i % 5])) as rollouts:
        rollouts.publish(make_snapshot(0))
        next_batch(rollouts, 0)
    assert sorted(w.most for w in workers) == [8000, 9000]
    assert sorted(len(w.prompt_ids) for w in workers) == [1, 4]


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


def test_a_stop_ends_the_wait_for_rollouts() -> None:
    with running(config(1), lambda: FakeWorker(lambda: 0.5)) as rollouts:
        rollouts.publish(make_snapshot(0))
        began = time.perf_counter()
        assert rollouts.next_batch(0, lambda: True) is None
        assert time.perf_counter() - began < 0.45
        assert rollouts.state().pending == [0, 1, 2, 3, 4, 5], "prompts in flight are generated again"


def test_nothing_is_generated_under_a_snapshot_that_is_only_tried() -> None:
    workers = [FakeWorker(lambda: 0.001) for _ in range(2)]
    with running(config(1), iter(workers).__next__) as rollouts:
        rollouts.publish(make_snapshot(0), generates=False)
        time.sleep(0.05)
        assert all(worker.version == 0 and not worker.prompt_ids for worker in workers)
        rollouts.publish(make_snapshot(0))
        assert next_batch(rollouts, 0).prompt_ids
