"""The training loop. Synchronous and asynchronous runs differ only in the `Rollouts` object."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from tora.reporting.evaluation import EvalResult
from tora.run.bad_steps import BadSteps
from tora.run.evaluations import Evaluations
from tora.run.frozen_heap import frozen_heap
from tora.run.idle_steps import IdleSteps
from tora.run.run import Run
from tora.run.step import train_step

End = Literal["finished", "stopped", "early", "idle"]
"""Why a run ended: it reached its last step, a stop was requested, the held-out reward no longer rose, or steps
trained nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run reports."""

    before: EvalResult | None
    """At the first step of this process; None if it was not evaluated then."""
    before_step: int
    """The step after which this process began: more than 0 if it resumed."""
    after: EvalResult | None
    """The last one after a step; None if there is none."""
    after_step: int
    """The step after which it was measured."""
    end: End
    bytes_per_sync: int
    seconds: float
    """Training time, including that before a resume."""
    reason: str = ""
    """With `idle`: a sentence."""
    all_idle: bool = False
    """Whether no step of this process trained anything."""


@frozen_heap()
def train(run: Run) -> Outcome:
    """Train from `run.state.step` to `run.cfg.num_steps`, or until a stop is requested.

    Step k trains policy version k and produces version k + 1. A stop ends the loop after the current step, or at once
    while it waits for rollouts, a sync or an evaluation; either way a checkpoint is saved. After a bad step a
    checkpoint that is due waits for the next good step. Raises TrainingError after `max_bad_steps` bad steps in a row.
    """
    cfg, state = run.cfg, run.state
    start = time.perf_counter() - state.seconds
    run.try_out()
    sync = run.publish(state.step)
    bytes_per_sync = sync.get("sync/bytes", 0.0)
    evaluations, end = Evaluations(run), "finished"
    evaluations.at_start()
    run.let_save(True)
    bad_steps, idle_steps, saved = BadSteps(cfg.max_bad_steps), IdleSteps(cfg.max_idle_steps), state.step
    for step in range(state.step, cfg.num_steps):
        began = time.perf_counter()
        trained = train_step(run, step)
        if trained is None:
            run.save(replaces=not bad_steps.in_a_row)
            end = "stopped"
            break
        batch, result = trained.batch, trained.result
        state.seconds = time.perf_counter() - start
        sync = run.publish(result.version)
        bytes_per_sync = sync.get("sync/bytes", bytes_per_sync)  # absent while every worker is restarting
        own = {**trained.metrics, "time/step_s": time.perf_counter() - began}
        memory = {"memory/learner_gib": result.memory_gib} if result.memory_gib else {}
        metrics = {"version": float(result.version), **batch.metrics, **result.metrics, **sync, **memory, **own}
        run.log.step(step, metrics, batch.prompt_ids)
        run.log_completions(step, batch)
        if sentence := idle_steps.add(step + 1, batch):
            run.log.warning(sentence)
        if sentence := bad_steps.add(step + 1, batch, result):
            run.log.warning(sentence)
            bad_steps.check(run.checkpoints.newest)
        if run.stop_requested():
            end = "stopped"
        elif idle_steps.sentence:
            end = "idle"
        last = end != "finished" or state.step == cfg.num_steps
        if end != "stopped" and evaluations.after_a_step(last=last):
            last, end = True, "early"
        is_due = state.step // cfg.checkpoint.every > saved // cfg.checkpoint.every
        if last or (is_due and not bad_steps.in_a_row):
            state.seconds = time.perf_counter() - start
            run.save(replaces=not bad_steps.in_a_row)
            saved = state.step
            if not last:
                run.push()
        if last:
            break
    run.end_save()
    seconds = time.perf_counter() - start
    return Outcome(
        before=evaluations.before,
        before_step=evaluations.before_step,
        after=evaluations.after,
        after_step=evaluations.after_step,
        end=end,
        bytes_per_sync=int(bytes_per_sync),
        seconds=seconds,
        reason=idle_steps.sentence,
        all_idle=idle_steps.all_idle,
    )
