"""`tora bench async`: the real loop, pool and buffer around a learner and workers that only sleep.

Runs the scenario with `max_staleness` and with 0, which is the synchronous schedule; comparing the two shows what the
schedule alone is worth. A third run without any sleep measures the overhead of loop, pool and buffer.

The batch size equals the workers' capacity, so one wave of groups makes one step.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.pool import AsyncRollouts
from actors.prompts_ahead import PromptMaker, PromptSource
from tora.bench.rows import write_json
from tora.config.schema import ModelConfig, RolloutConfig, RunConfig, SyncConfig
from tora.errors import ConfigError
from tora.protocols import Occupancy
from tora.reporting.metrics import NoLog
from tora.run.canary import Canary
from tora.run.checkpoints import Checkpoints, RunState
from tora.run.loop import train
from tora.run.run import Run
from tora.types import (
    GroupResult,
    LogprobRequest,
    MicroBatch,
    PolicySnapshot,
    Prompt,
    Rollout,
    StepResult,
    StopReason,
    SyncReport,
    TrainBatch,
)

_GROUP, _TOKENS = 8, 64
"""Rollouts per group and tokens per rollout. The loop packs them into real batches."""
WARM_UP = 3
"""Untimed steps until the pipeline is full."""


@dataclass(frozen=True, slots=True)
class Scenario:
    num_actors: int
    """Workers; each runs one group at a time."""
    gen_latency: float
    """Mean seconds per group."""
    learn_latency: float
    """Seconds per step."""
    jitter: float
    """Standard deviation of the logarithm of the seconds per group."""
    num_steps: int
    seed: int = 0
    oversample: float | None = None
    """`rollout.oversample`; None for steps that wait for slow groups."""
    step_parts: int | None = None


@dataclass(slots=True)
class Measured:
    """One run of a scenario, after the warm-up."""

    max_staleness: int
    num_actors: int
    num_groups: int
    seconds: float
    groups_per_s: float
    overhead_ms: float | None
    """Milliseconds per group in a run without sleep; None for other runs."""
    staleness: dict[int, float] = field(default_factory=dict)
    """Share of groups trained at each staleness."""


class SleepingWorker:
    """A rollout worker without an engine. It sleeps in a coroutine, so thousands fit in one process."""

    def __init__(self, scenario: Scenario, number: int) -> None:
        self._scenario, self._random = scenario, random.Random(f"{scenario.seed} {number}")
        self._version = 0

    def _seconds(self) -> float:
        sigma = self._scenario.jitter
        return self._scenario.gen_latency * math.exp(self._random.gauss(-sigma * sigma / 2, sigma))

    async def start(self, limit_s: float) -> None: ...

    async def run_group(self, prompt: Prompt) -> GroupResult:
        version = self._version
        await asyncio.sleep(self._seconds())
        return result_of(version)

    async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
        """Beside its group, and all together: an engine with room for them."""
        return list(await asyncio.gather(*map(self.run_group, prompts)))

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]:
        return [np.zeros(len(request.completion), np.float32) for request in requests]

    async def forward(self, snapshot: PolicySnapshot) -> SyncReport:
        self._version = snapshot.version
        return SyncReport(snapshot.version, 0, 0.0, "", 0)

    async def occupancy(self) -> Occupancy:
        return Occupancy()

    async def close(self) -> None: ...

    def keep_log(self) -> str:
        return ""

    def kill(self) -> None: ...


class SleepingLearner:
    """Records the staleness of its batches and when each step ends."""

    def __init__(self, seconds: float, batch_size: int) -> None:
        """`seconds`: of a step of `batch_size` groups."""
        self._seconds, self._batch_size, self._version = seconds, batch_size, 0
        self.staleness: Counter[int] = Counter()
        """Number of groups at each staleness, after the warm-up."""
        self.ends: list[float] = []
        """End of each step, by `time.perf_counter`."""

    @property
    def seconds(self) -> float:
        """Of the steps after the warm-up."""
        return self.ends[-1] - self.ends[WARM_UP - 1]

    def accumulate(self, batch: TrainBatch) -> None:
        """Sleeps for the share of the step's groups that this part has."""
        groups = 0
        for micro in batch.micro_batches:
            versions_P = _versions(micro)
            groups += len(versions_P)
            if self._version >= WARM_UP:
                self.staleness.update((self._version - versions_P).tolist())
        time.sleep(self._seconds * groups / self._batch_size)

    def step(self, batch: TrainBatch) -> StepResult:
        self.accumulate(batch)
        self._version += 1
        self.ends.append(time.perf_counter())
        return StepResult(self._version, {})

    def snapshot(self) -> PolicySnapshot:
        return PolicySnapshot(self._version, (), np.empty(0, np.uint8), "")

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        return np.zeros(len(batch.targets_N), np.float32)

    def begin_save(self, folder: Path) -> None: ...

    def end_save(self) -> None: ...

    def restore(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None: ...

    def try_out(self, on: bool) -> None: ...


def result_of(version: int) -> GroupResult:
    """A group whose rollouts are all of one version."""
    return GroupResult(tuple(_rollout(float(i % 2), version) for i in range(_GROUP)))


def _rollout(reward: float, version: int) -> Rollout:
    return Rollout(
        token_ids=np.arange(_TOKENS),
        sampled=np.ones(_TOKENS, bool),
        actor_logprobs=np.zeros(_TOKENS, np.float32),
        versions=np.full(_TOKENS, version),
        stop_reason=StopReason.STOP,
        text="",
        reward=reward,
        reward_parts={"simulated": reward},
    )


def _versions(micro: MicroBatch) -> np.ndarray:
    """The version of each group's oldest token, as in a run's `staleness/max`."""
    oldest_P = np.full(micro.groups_B.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(oldest_P, micro.groups_B[micro.sequence_N], micro.versions_N)
    return oldest_P[np.unique(micro.groups_B)]


def simulate(scenario: Scenario, max_staleness: int) -> Measured:
    cfg = scenario_config(scenario, max_staleness)
    numbers = count()
    learner = timed_run(cfg, lambda: SleepingWorker(scenario, next(numbers)), prompt, scenario.learn_latency)
    num_groups = cfg.batch_size * scenario.num_steps
    seconds = learner.seconds
    idle = scenario.gen_latency + scenario.learn_latency
    total = sum(learner.staleness.values())
    return Measured(
        max_staleness=max_staleness,
        num_actors=scenario.num_actors,
        num_groups=num_groups,
        seconds=seconds,
        groups_per_s=num_groups / seconds,
        overhead_ms=None if idle else 1000 * seconds / num_groups,
        staleness={age: count / total for age, count in sorted(learner.staleness.items())},
    )


def timed_run(
    cfg: RunConfig,
    make_worker: Callable[[], Any],
    prompt_at: Callable[[int], Prompt],
    learn_latency: float,
    learner: SleepingLearner | None = None,
    eval_prompts: Sequence[Prompt] = (),
    prompts: PromptSource | None = None,
) -> SleepingLearner:
    """A run of `cfg` on workers of one's own, with a learner that sleeps `learn_latency` seconds a step, or another.
    `prompts`: what makes them; None for `prompt_at` in threads."""
    learner, state = learner or SleepingLearner(learn_latency, cfg.batch_size), RunState()
    prompts = prompts or PromptMaker(lambda position: partial(prompt_at, position))
    rollouts = AsyncRollouts(cfg, make_worker, prompts, eval_prompts, state.rollouts, version=0)
    try:
        with tempfile.TemporaryDirectory(prefix="tora-bench-") as scratch:
            run = Run(
                cfg=cfg,
                folder=Path(scratch),
                learner=learner,
                make_learner=lambda: learner,
                rollouts=rollouts,
                canary=Canary.from_config(cfg, [prompt(0)]),
                log=NoLog(),
                is_alone=True,
                checkpoints=Checkpoints(Path(scratch), keep=1),
                state=state,
                eval_sets={"held out": len(eval_prompts)},
                prompt_at=prompt_at,
                stop_requested=lambda: False,
            )
            train(run)
    finally:
        rollouts.close()
    return learner


def scenario_config(scenario: Scenario, max_staleness: int) -> RunConfig:
    return RunConfig(
        name="simulation",
        async_rl=True,
        max_staleness=max_staleness,
        num_steps=WARM_UP + scenario.num_steps,
        batch_size=scenario.num_actors,
        grpo_samples=_GROUP,
        max_generated_tokens=_TOKENS,
        micro_batch_tokens=1 << 30,  # one micro-batch per part, so no group is split
        step_parts=scenario.step_parts,
        model=ModelConfig(path=""),
        dataset={},
        rewards=[],
        rollout=_rollout_config(scenario),
        sync=SyncConfig(canary_every=0),
    )


def _rollout_config(scenario: Scenario) -> RolloutConfig:
    cfg = RolloutConfig(num_workers=scenario.num_actors, concurrency=1)
    if scenario.oversample is not None:
        cfg.stragglers, cfg.oversample = "oversample", scenario.oversample
    return cfg


def prompt(prompt_id: int) -> Prompt:
    return Prompt(prompt_id, tuple(range(_TOKENS)), "", {})


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError if an argument is out of range."""
    for name, minimum in {
        "actors": 1,
        "steps": 1,
        "staleness": 0,
        "gen_latency": 0,
        "learn_latency": 0,
        "jitter": 0,
        "oversample": 0,
        "parts": 1,
    }.items():
        value = getattr(args, name)
        if value is not None and not minimum <= value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {minimum}.")
    scenario = Scenario(
        args.actors,
        args.gen_latency,
        args.learn_latency,
        args.jitter,
        args.steps,
        oversample=args.oversample,
        step_parts=args.parts,
    )
    asynchronous = simulate(scenario, args.staleness)
    synchronous = simulate(scenario, 0)
    without_sleep = simulate(Scenario(args.actors, 0.0, 0.0, 0.0, max(args.steps, 20)), args.staleness)
    _show(scenario, asynchronous, synchronous, without_sleep)
    if args.json is not None:
        write_json([asynchronous, synchronous, without_sleep], Path(args.json))
    return 0


def _show(scenario: Scenario, asynchronous: Measured, synchronous: Measured, without_sleep: Measured) -> None:
    s = scenario
    title = (
        f"{s.num_actors} workers, {s.gen_latency:g} s per group (jitter {s.jitter:g}), {s.learn_latency:g} s per step"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("schedule")
    for heading in ("groups/s", "s/step", "against sync", "groups by staleness"):
        table.add_column(heading, justify="right")
    for name, run in (("synchronous", synchronous), (f"max_staleness {asynchronous.max_staleness}", asynchronous)):
        table.add_row(
            name,
            f"{run.groups_per_s:,.0f}",
            f"{run.seconds / scenario.num_steps:.3f}",
            f"{run.groups_per_s / synchronous.groups_per_s:.2f}",
            "  ".join(f"{age}: {share:.0%}" for age, share in run.staleness.items()),
        )
    console = Console()
    console.print(table)
    console.print(f"Overhead of loop, pool and buffer: {without_sleep.overhead_ms:.2f} ms per group.", highlight=False)
