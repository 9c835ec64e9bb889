"""The training loop. Synchronous and asynchronous runs differ only in the `Rollouts` object."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tora.run.run import Run
from tora.types import EvalResult


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run reports."""

    before: EvalResult | None
    """At the first step of this process; None without `eval`."""
    after: EvalResult | None
    bytes_per_sync: int
    seconds: float
    """Training time, including that before a resume."""


def train(run: Run) -> Outcome:
    """Train from `run.state.step` to `run.cfg.num_steps`, or until a stop is requested.

    Step k trains policy version k and produces version k + 1. A stop ends the loop after the current step, or at once
    while it waits for rollouts; either way a checkpoint is saved.
    """
    cfg, state = run.cfg, run.state
    start = time.perf_counter() - state.seconds
    sync = run.publish(state.step)
    bytes_per_sync = int(sync["sync/bytes"])
    before = after = run.evaluate()
    for step in range(state.step, cfg.num_steps):
        began = time.perf_counter()
        batch = run.rollouts.next_batch(step, run.stop_requested)
        if batch is None:
            run.save(time.perf_counter() - start)
            break
        generated = time.perf_counter()
        result = run.learner.step(batch)
        learned = time.perf_counter()
        sync = run.publish(result.version)
        state.step = step + 1
        times = {
            "time/rollout_s": generated - began,
            "time/learner_s": learned - generated,
            "time/step_s": time.perf_counter() - began,
        }
        metrics = {"version": float(result.version), **batch.metrics, **result.metrics, **sync, **times}
        run.log.step(step, metrics, batch.prompt_ids)
        stop = run.stop_requested()
        last = stop or state.step == cfg.num_steps
        if cfg.eval and not stop and (last or state.step % cfg.eval.every == 0):
            after = run.evaluate()
        if last or state.step % cfg.checkpoint.every == 0:
            run.save(time.perf_counter() - start)
        if stop:
            break
    return Outcome(before, after, bytes_per_sync, time.perf_counter() - start)
