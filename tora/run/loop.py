"""The training loop, once. Synchronous and asynchronous runs differ in the `Rollouts` object only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tora.config.schema import RunConfig
from tora.protocols import Learner, Rollouts
from tora.run.canary import Canary
from tora.run.checkpoints import Checkpoints, RunState
from tora.types import EvalResult, Metrics, Prompt, Rollout


class Log(Protocol):
    """Where numbers go; `tora.reporting.metrics` implements it. Only the loop logs."""

    def step(self, step: int, metrics: Metrics, prompt_ids: Sequence[int]) -> None: ...

    def evaluation(self, step: int, result: EvalResult) -> None: ...

    def sample(self, prompt: Prompt, rollout: Rollout) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run says of itself at its end."""

    before: EvalResult | None
    after: EvalResult | None
    bytes_per_sync: int
    seconds: float


def train(
    cfg: RunConfig,
    learner: Learner,
    rollouts: Rollouts,
    canary: Canary,
    log: Log,
    checkpoints: Checkpoints,
    state: RunState,
    stop_requested: Callable[[], bool],
) -> Outcome:
    """From `state.step` to `cfg.num_steps`; a stop that is requested ends the step, or the wait for its rollouts.

    Step k trains policy version k and makes version k + 1.
    """
    start = time.perf_counter() - state.seconds
    sync = _publish(state.step, learner, rollouts, canary)
    bytes_per_sync = int(sync["sync/bytes"])
    before = after = _evaluate(cfg, rollouts, log, state.step)
    for step in range(state.step, cfg.num_steps):
        began = time.perf_counter()
        batch = rollouts.next_batch(step, stop_requested)
        if batch is None:
            _save(checkpoints, state, rollouts, learner, start)
            break
        generated = time.perf_counter()
        result = learner.step(batch)
        learned = time.perf_counter()
        sync = _publish(result.version, learner, rollouts, canary)
        state.step = step + 1
        times = {
            "time/rollout_s": generated - began,
            "time/learner_s": learned - generated,
            "time/step_s": time.perf_counter() - began,
        }
        metrics = {"version": float(result.version), **batch.metrics, **result.metrics, **sync, **times}
        log.step(step, metrics, batch.prompt_ids)
        stop = stop_requested()
        last = stop or state.step == cfg.num_steps
        if cfg.eval and not stop and (last or state.step % cfg.eval.every == 0):
            after = _evaluate(cfg, rollouts, log, state.step)
        if last or state.step % cfg.checkpoint.every == 0:
            _save(checkpoints, state, rollouts, learner, start)
        if stop:
            break
    return Outcome(before, after, bytes_per_sync, time.perf_counter() - start)


def _save(checkpoints: Checkpoints, state: RunState, rollouts: Rollouts, learner: Learner, start: float) -> None:
    state.rollouts, state.seconds = rollouts.state(), time.perf_counter() - start
    checkpoints.save(state, learner)


def _publish(version: int, learner: Learner, rollouts: Rollouts, canary: Canary) -> Metrics:
    metrics = rollouts.publish(learner.snapshot())
    return {**metrics, **canary.check(version, learner, rollouts)}


def _evaluate(cfg: RunConfig, rollouts: Rollouts, log: Log, step: int) -> EvalResult | None:
    if cfg.eval is None:
        return None
    result = rollouts.evaluate()
    log.evaluation(step, result)
    if result.sample is not None:
        log.sample(*result.sample)
    return result
