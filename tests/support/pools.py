"""An `AsyncRollouts` around fake workers, workers that fail, and checks of what was trained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from fakes import FakeWorker, make_prompt

from actors.pool import AsyncRollouts
from actors.prompts_ahead import PromptMaker
from actors.seat import SeatTiming
from tora.config.schema import EvalConfig, ModelConfig, RolloutConfig, RunConfig
from tora.errors import RolloutError, WorkerLost
from tora.protocols import Occupancy
from tora.types import Group, GroupResult, Prompt, RolloutState, SyncReport, TrainBatch

QUICK = SeatTiming(heartbeat_every_s=0.01, first_delay_s=0.001, max_delay_s=0.001)
"""Lost workers are detected and replaced at once."""


def config(bound: int, *, workers: int = 2, concurrency: int = 3, batch_size: int = 4, **rollout: Any) -> RunConfig:
    return RunConfig(
        name="fake",
        async_rl=True,
        max_staleness=bound,
        batch_size=batch_size,
        step_parts=1,
        grpo_samples=2,
        model=ModelConfig(path="none"),
        dataset={},
        rewards=[],
        rollout=RolloutConfig(num_workers=workers, concurrency=concurrency, max_refills=2.0, **rollout),
        eval=EvalConfig(dataset={}),
    )


@contextmanager
def running(
    cfg: RunConfig,
    make_worker: Any,
    *,
    prompt_at: Any = make_prompt,
    state: Any = None,
    version: int = 0,
    timing: SeatTiming | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    watch: Callable[[], object] = lambda: None,
    make_evaluator: Any = None,
) -> Iterator[AsyncRollouts]:
    held_out = [make_prompt(i) for i in range(5)]
    rollouts = AsyncRollouts(
        cfg,
        make_worker,
        PromptMaker(lambda position: partial(prompt_at, position)),
        held_out,
        state or RolloutState(),
        version=version,
        timing=timing,
        stop_requested=stop_requested,
        watch=watch,
        make_evaluator=make_evaluator,
    )
    try:
        yield rollouts
    finally:
        rollouts.close()


def next_batch(rollouts: AsyncRollouts, step: int) -> TrainBatch:
    batch = rollouts.next_batch(step, lambda: False)
    assert batch is not None
    return batch


def evaluate(rollouts: AsyncRollouts, *, pinned: bool = False) -> list[Group] | None:
    rollouts.start_evaluation(pinned=pinned)
    return rollouts.evaluated(wait=True)


def some_without_signal(prompt: Prompt) -> list[float]:
    """Rewards: every third prompt's are all equal, so that its group is dropped."""
    return [0.0, 1.0] if prompt.id % 3 else [1.0, 1.0]


def pending(state: RolloutState) -> set[int]:
    """Prompts that a resumed run would still train."""
    return {*state.pending, *(group.prompt.id for _, group in state.finished)}


def check_each_prompt_once(trained: Sequence[int], state: RolloutState) -> None:
    """Every prompt before the cursor was trained, or will be, or had no signal; none was or will be trained twice."""
    assert len(trained) == len(set(trained)), "none twice"
    assert not set(trained) & pending(state)
    without_signal = {i for i in range(state.cursor) if i % 3 == 0}
    assert set(trained) | pending(state) | without_signal >= set(range(state.cursor)), "none lost"


FAULTS = ["crash", "broken engine", "out of memory", "hang", "crash at a sync", "frozen"]


class MortalWorker(FakeWorker):
    """Fails in the ways real workers do. Once it is dead, everything in flight fails with it."""

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
