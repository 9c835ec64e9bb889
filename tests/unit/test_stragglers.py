"""Slow groups: what the pool, a worker and an engine do about those that nobody waits for."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeWorker, make_prompt, make_snapshot
from pools import config, next_batch, pending, running
from test_generate import model as model
from test_generate import ready
from test_worker import PROMPT, make_worker

from actors.abort import Aborted, abortable
from actors.buffer import spare_slots
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.types import Completion, GroupResult, Prompt, RolloutState, SampleRequest, Sampling


class Slow(FakeWorker):
    """Never finishes some prompts at the first try."""

    def __init__(self, slow: Sequence[int]) -> None:
        super().__init__(lambda: 0.001)
        self.slow, self.aborted = set(slow), list[int]()

    async def run_group(self, prompt: Prompt) -> GroupResult:
        if prompt.id not in self.slow:
            return await super().run_group(prompt)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.aborted.append(prompt.id)
            self.slow.remove(prompt.id)
            raise
        raise AssertionError


def test_slow_groups_hold_up_no_step_and_are_generated_again() -> None:
    worker = Slow([1, 6, 11, 12])
    cfg = config(1, workers=1, concurrency=8, stragglers="oversample", oversample=0.5)
    trained: list[int] = []
    with running(cfg, lambda: worker) as rollouts:
        rollouts.publish(make_snapshot(0))
        for step in range(12):
            batch = next_batch(rollouts, step)
            assert batch.metrics["staleness/max"] <= 1 and len(batch.prompt_ids) == 4
            trained += batch.prompt_ids
            time.sleep(0.02)  # the learner's, in which all but the slow ones finish
            rollouts.publish(make_snapshot(step + 1))
        state = rollouts.state()
        assert batch.metrics["rollout/groups_aborted"] == len(worker.aborted) > 0
    assert set(worker.aborted) <= {1, 6, 11, 12} and set(worker.aborted) <= set(trained) | pending(state)
    assert len(trained) == len(set(trained)) and not set(trained) & pending(state), "none twice"
    assert set(trained) | pending(state) >= set(range(state.cursor)), "none lost"


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_random_latencies_with_oversampling(bound: int) -> None:
    rng = random.Random(bound)
    cfg = config(bound, stragglers="oversample", oversample=1.0)
    trained: list[int] = []
    with running(cfg, lambda: FakeWorker(lambda: rng.expovariate(400))) as rollouts:
        rollouts.publish(make_snapshot(0))
        for step in range(30):
            batch = next_batch(rollouts, step)
            assert batch.metrics["staleness/max"] <= bound
            trained += batch.prompt_ids
            rollouts.publish(make_snapshot(step + 1))
        state = rollouts.state()
    assert len(trained) == len(set(trained)) == 120 and not set(trained) & pending(state)
    assert set(trained) | pending(state) >= set(range(state.cursor))


def test_a_rewind_waits_for_no_group_of_the_lost_history() -> None:
    worker = Slow(range(8))
    with running(config(1, workers=1, concurrency=8), lambda: worker) as rollouts:
        rollouts.publish(make_snapshot(0))
        while len(rollouts.state().pending) < 8:
            time.sleep(0.01)
        rollouts.rewind(RolloutState(100), 0)
        rollouts.publish(make_snapshot(0))
        assert next_batch(rollouts, 0).prompt_ids == (100, 101, 102, 103)
        assert sorted(worker.aborted) == list(range(8))


def test_spare_slots_are_a_share_of_the_batch() -> None:
    cfg = config(1, batch_size=6)
    assert spare_slots(cfg) == 0, "steps wait by default"
    for share, slots in ((0.25, 2), (0.0, 0), (1.0, 6)):
        rollout = replace(cfg.rollout, stragglers="oversample", oversample=share)
        assert spare_slots(replace(cfg, rollout=rollout)) == slots


def test_a_synchronous_run_has_no_stragglers() -> None:
    with pytest.raises(ConfigError, match="stragglers=oversample needs async_rl=true"):
        load_config("quickstart", ["rollout.stragglers=oversample", "async_rl=false"])


class Endless:
    """Generates until it is aborted."""

    def __init__(self) -> None:
        self.began = threading.Event()

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        from actors.abort import raise_if_aborted

        while True:
            raise_if_aborted()
            self.began.set()


def test_a_worker_ends_an_aborted_group_and_no_other() -> None:
    engine = Endless()
    worker = make_worker(engine)
    answers: list[GroupResult] = []
    thread = threading.Thread(target=lambda: answers.append(worker.run_group(make_prompt(0), 7)))
    thread.start()
    assert engine.began.wait(30)
    worker.abort(8)
    thread.join(0.05)
    assert thread.is_alive(), "another ticket"
    worker.abort(7)
    thread.join(30)
    assert answers == [GroupResult(())]
    worker.abort(7)
    again = make_worker()
    again.abort(7)
    assert len(again.run_group(PROMPT, 7).rollouts) == 3, "a call that has not begun is not aborted"


@pytest.mark.parametrize("model", ["lora"], indirect=True)
def test_the_torch_engine_stops_within_a_step(model: object, tmp_path: Path) -> None:
    engine, flag = ready(model), threading.Event()
    asked = [SampleRequest((5, 9), 2, 1, Sampling(100_000))]
    threading.Timer(0.3, flag.set).start()
    with abortable(flag), pytest.raises(Aborted):
        engine.generate(asked)
    assert len(engine.generate([SampleRequest((5, 9), 2, 1, Sampling(4))])[0]) == 2, "and goes on"
