"""Training that outlives its learner: a lost one is replaced, and the run goes back to its newest checkpoint.

A learner that starts again from step c makes versions c + 1, c + 2, ... which are not the ones that the lost learner
made under these numbers. Groups that the lost versions drew belong to policies that nobody holds any more: they would
be younger than the learner, and their numbers would name other policies. So the rollout side goes back to c as well:
to the checkpoint's prompt cursor, its finished groups and the ids that were in flight then. What came later is dropped,
generated again, and trained once in the history that survives. It is as if the run had been resumed from c, but for
the rollout workers, which stay up. Rows of `metrics.jsonl` after c are cut; other loggers keep theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tora.config.schema import RunConfig
from tora.errors import LearnerLost
from tora.protocols import Learner, Rollouts
from tora.run.canary import Canary
from tora.run.checkpoints import Checkpoints, RunState
from tora.run.loop import Log, Outcome, train
from tora.types import Prompt

_log = logging.getLogger(__name__)


class RewindableLog(Log, Protocol):
    def rewind(self, step: int) -> None: ...


def train_and_export(
    cfg: RunConfig,
    make_learner: Callable[[], Learner],
    learner: Learner,
    rollouts: Rollouts,
    canary: Canary,
    log: RewindableLog,
    checkpoints: Checkpoints,
    state: RunState,
    prompt_at: Callable[[int], Prompt],
    stop_requested: Callable[[], bool],
    adapter: Path,
) -> Outcome:
    """`train`, then `export` into `adapter`. `make_learner` replaces a lost one.

    `state` stays the run's, whatever becomes of its learners. Errors: LearnerLost after `cfg.max_learner_restarts`.
    """
    for losses in range(cfg.max_learner_restarts + 1):
        try:
            if losses:
                learner = make_learner()
                if (folder := checkpoints.newest()) is not None:
                    learner.restore(folder)
            outcome = train(cfg, learner, rollouts, canary, log, checkpoints, state, stop_requested)
            learner.export(adapter)
            return outcome
        except LearnerLost as error:
            folder = checkpoints.newest()
            state.assign(checkpoints.read(folder, prompt_at) if folder else RunState())
            if losses == cfg.max_learner_restarts:
                how = f"resume_from_checkpoint=true goes on from step {state.step}" if folder else "no checkpoint yet"
                raise LearnerLost(f"{error}, and max_learner_restarts={losses} is used up; {how}.") from error
            _log.warning("%s; it starts again from step %d", error, state.step)
            rollouts.rewind(state.rollouts, state.step)
            log.rewind(state.step)
    raise AssertionError("the loop returns or raises")
