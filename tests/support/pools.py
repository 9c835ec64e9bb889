"""An `AsyncRollouts` around fake workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fakes import make_prompt

from actors.pool import AsyncRollouts
from actors.seat import SeatTiming
from tora.config.schema import EvalConfig, ModelConfig, RolloutConfig, RunConfig
from tora.types import RolloutState, TrainBatch

QUICK = SeatTiming(heartbeat_every_s=0.01, first_delay_s=0.001, max_delay_s=0.001)
"""Lost workers are noticed and replaced at once."""


def config(bound: int, *, workers: int = 2, concurrency: int = 3, batch_size: int = 4, **rollout: Any) -> RunConfig:
    return RunConfig(
        name="fake",
        async_rl=True,
        max_staleness=bound,
        batch_size=batch_size,
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
) -> Iterator[AsyncRollouts]:
    held_out = [make_prompt(i) for i in range(5)]
    rollouts = AsyncRollouts(
        cfg, make_worker, prompt_at, held_out, state or RolloutState(), version=version, timing=timing
    )
    try:
        yield rollouts
    finally:
        rollouts.close()


def next_batch(rollouts: AsyncRollouts, step: int) -> TrainBatch:
    batch = rollouts.next_batch(step, lambda: False)
    assert batch is not None
    return batch
