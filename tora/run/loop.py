"""The training loop. Synchronous and asynchronous runs differ only in the `Rollouts` object."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tora.run.bad_steps import BadSteps
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
    while it waits for rollouts; either way a checkpoint is saved. After a bad step a checkpoint that is due waits for
    the next good step. Raises TrainingError after `max_bad_steps` bad steps in a row.
    """
    cfg, state = run.cfg, run.state
    start = time.perf_counter() - state.seconds
    sync = run.publish(state.step)
    bytes_per_sync = sync.get("sync/bytes", 0.0)
    before = after = run.evaluate()
    bad_steps, saved = BadSteps(cfg.max_bad_steps), state.step
    for step in range(state.step, cfg.num_steps):
        began = time.perf_counter()
        batch = run.rollouts.next_batch(step, run.stop_requested)
        if batch is None:
            run.save(replaces=not bad_steps.in_a_row)
            break
        generated = time.perf_counter()
        result = run.learner.step(batch)
        learned = time.perf_counter()
        state.step, state.seconds = step + 1, learned - start
        sync = run.publish(result.version)
        bytes_per_sync = sync.get("sync/bytes", bytes_per_sync)  # absent while every worker is restarting
        times = {
            "time/rollout_s": generated - began,
            "time/learner_s": learned - generated,
            "time/step_s": time.perf_counter() - began,
        }
        metrics = {"version": float(result.version), **batch.metrics, **result.metrics, **sync, **times}
        run.log.step(step, metrics, batch.prompt_ids)
        if sentence := bad_steps.add(step + 1, batch, result):
            run.log.warning(sentence)
            bad_steps.check(run.checkpoints.newest)
        stop = run.stop_requested()
        last = stop or state.step == cfg.num_steps
        if cfg.eval and not stop and (last or state.step % cfg.eval.every == 0):
            after = run.evaluate()
        is_due = state.step // cfg.checkpoint.every > saved // cfg.checkpoint.every
        if last or (is_due and not bad_steps.in_a_row):
            state.seconds = time.perf_counter() - start
            run.save(replaces=not bad_steps.in_a_row)
            saved = state.step
        if stop:
            break
    return Outcome(before, after, int(bytes_per_sync), time.perf_counter() - start)
