"""The training loop, once. Synchronous and asynchronous runs differ in the `Rollouts` object only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tora.canary import Canary
from tora.config import RunConfig
from tora.protocols import Learner, Rollouts
from tora.run_state import Checkpoints, RunState
from tora.types import EvalResult, Metrics, Prompt, Rollout


class Log(Protocol):
    """Where numbers go; `tora.metrics` implements it. Only the loop logs."""

    def step(self, step: int, metrics: Metrics) -> None: ...

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
    """From `state.step` to `cfg.num_steps`, or to the end of the step in which a stop is requested.

    Step k trains policy version k and makes version k + 1.
    """
    start = time.perf_counter() - state.seconds
    sync = _publish(state.step, learner, rollouts, canary)
    before = after = _evaluate(cfg, rollouts, log, state.step)
    for step in range(state.step, cfg.num_steps):
        began = time.perf_counter()
        batch = rollouts.next_batch(step)
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
        log.step(step, {"version": float(result.version), **batch.metrics, **result.metrics, **sync, **times})
        stop = stop_requested()
        last = stop or state.step == cfg.num_steps
        if cfg.eval and not stop and (last or state.step % cfg.eval.every == 0):
            after = _evaluate(cfg, rollouts, log, state.step)
        if last or state.step % cfg.checkpoint.every == 0:
            state.rollouts, state.seconds = rollouts.state(), time.perf_counter() - start
            checkpoints.save(state, learner)
        if stop:
            break
    return Outcome(before, after, int(sync["sync/bytes"]), time.perf_counter() - start)


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
