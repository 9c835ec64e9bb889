"""Bounded staleness: properties over random histories."""

import random
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeWorker, make_group, make_prompt

from actors.buffer import Buffer, Slot
from actors.pool import AsyncRollouts
from tora.config import EvalConfig, ModelConfig, RolloutConfig, RunConfig
from tora.types import Group, Prompt


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("seed", range(60))
def test_staleness_never_exceeds_the_bound_and_nothing_stalls(bound: int, seed: int) -> None:
    rng = random.Random(seed)
    per_step = rng.randint(1, 6)
    buffer, running = Buffer(per_step, bound), list[Slot]()
    prompt_id, step = 0, 0
    while step < 40:
        moves = ["start"] * buffer.may_grant() + ["finish"] * bool(running) + ["train"] * buffer.can_take(step)
        assert moves, "nothing can happen: a deadlock"
        match rng.choice(moves):
            case "start":
                running.append(buffer.grant(make_prompt(prompt_id)))
                prompt_id += 1
            case "finish":
                slot = running.pop(rng.randrange(len(running)))
                if rng.random() < 0.3:
                    buffer.give_back(slot)
                else:
                    buffer.put(slot, make_group(slot.prompt, [0, 1], slot.born))
            case "train":
                groups = buffer.take(step)
                assert len(groups) == per_step
                assert all(0 <= step - group.version <= bound for group in groups)
                step += 1
                buffer.advance(step)


def test_bound_zero_is_the_synchronous_schedule() -> None:
    buffer = Buffer(2, 0)
    slots = [buffer.grant(make_prompt(i)) for i in range(2)]
    assert not buffer.may_grant(), "nothing runs ahead while the learner has yet to step"
    for slot in slots:
        buffer.put(slot, make_group(slot.prompt, [0, 1]))
    buffer.take(0)
    assert not buffer.may_grant(), "nothing starts under a version that is being replaced"
    buffer.advance(1)
    assert buffer.may_grant()


def test_pending_names_what_a_resumed_run_must_generate_again() -> None:
    buffer = Buffer(2, 1)
    slots = [buffer.grant(make_prompt(i)) for i in range(4)]
    buffer.put(slots[2], make_group(slots[2].prompt, [0, 1]))
    buffer.give_back(slots[1])
    assert buffer.pending() == [0, 2, 3]


def config(bound: int, concurrency: int = 3) -> RunConfig:
    return RunConfig(
        name="fake",
        async_rl=True,
        max_staleness=bound,
        batch_size=4,
        model=ModelConfig(path="none"),
        dataset={},
        rewards=[],
        rollout=RolloutConfig(num_workers=2, concurrency=concurrency, max_refills=2.0),
        eval=EvalConfig(dataset={}),
    )


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_pool_under_random_latencies(bound: int) -> None:
    rng = random.Random(bound)
    workers = [
        FakeWorker(lambda: rng.expovariate(400), lambda p: [0.0, 1.0] if p.id % 3 else [1.0, 1.0]) for _ in range(2)
    ]
    rollouts = AsyncRollouts(config(bound), workers, make_prompt, [make_prompt(i) for i in range(5)], {}, version=0)
    try:
        rollouts.publish(0)
        worst = 0.0
        for step in range(30):
            batch = rollouts.next_batch(step)
            assert batch.metrics["staleness/max"] <= bound
            worst = max(worst, batch.metrics["staleness/max"])
            assert sum(len(m.lengths_B) for m in batch.micro_batches) == 4 * 2, "dropped groups are refilled"
            rollouts.publish(step + 1)
        assert worst == bound, "it does run ahead where it may"
        assert rollouts.evaluate().accuracy == pytest.approx(2 / 5)
        state = rollouts.state()
        ids = [i for w in workers for i in w.prompt_ids]
        assert len(ids) == len(set(ids)), "no prompt twice"
        started = set(ids) | set(state["pending"])  # read after the state: the workers may have begun some more
        assert set(range(state["cursor"])) <= started, "no prompt lost"
    finally:
        rollouts.close()
    assert all(w.closed for w in workers)


def test_pool_resumes_where_it_stood() -> None:
    worker = FakeWorker(lambda: 0.0, lambda p: [0.0, 1.0])
    rollouts = AsyncRollouts(config(0), [worker], make_prompt, [], {"cursor": 50, "pending": [7, 9]}, version=12)
    try:
        rollouts.publish(12)
        rollouts.next_batch(12)
        assert worker.prompt_ids[:4] == [7, 9, 50, 51]
    finally:
        rollouts.close()


def test_a_failing_worker_ends_the_wait_with_its_error() -> None:
    def explode(prompt: object) -> list[float]:
        raise RuntimeError("the engine is gone")

    rollouts = AsyncRollouts(config(1), [FakeWorker(lambda: 0.0, explode)], make_prompt, [], {}, version=0)
    try:
        rollouts.publish(0)
        with pytest.raises(RuntimeError, match="the engine is gone"):
            rollouts.next_batch(0)
    finally:
        rollouts.close()


class InFlightWorker(FakeWorker):
    """Its tokens are of every version that it was given while they were sampled."""

    async def run_group(self, prompt: Prompt) -> Group:
        began = self.version
        group = await super().run_group(prompt)
        versions = [np.linspace(began, self.version, len(r.token_ids)).astype(np.int64) for r in group.rollouts]
        mixed = tuple(replace(r, versions=v) for r, v in zip(group.rollouts, versions, strict=True))
        return replace(group, rollouts=mixed)


def test_the_oldest_token_of_a_mixed_rollout_keeps_the_bound() -> None:
    rng = random.Random(0)
    workers = [InFlightWorker(lambda: rng.expovariate(300), lambda p: [0.0, 1.0]) for _ in range(2)]
    rollouts = AsyncRollouts(config(2), workers, make_prompt, [], {}, version=0)
    try:
        rollouts.publish(0)
        mixed = 0.0
        for step in range(30):
            batch = rollouts.next_batch(step)
            versions_N = np.concatenate([m.versions_N for m in batch.micro_batches])
            assert batch.metrics["staleness/max"] == step - versions_N.min() <= 2
            mixed += batch.metrics["rollout/mixed_share"]
            rollouts.publish(step + 1)
        assert mixed > 0
    finally:
        rollouts.close()
