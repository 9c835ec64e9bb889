"""Recovery from a lost learner: replace it and go back to the newest checkpoint.

A learner that restarts from step c produces versions c + 1, c + 2, ... again, and these are other policies than the
ones the lost learner published under the same numbers. Groups sampled by the lost versions cannot be kept: no learner
holds their policies, they would be newer than the learner, and their version numbers would refer to different weights.
So the rollout side goes back to c too: to the checkpoint's prompt cursor, its finished groups, and the prompts that
were in flight then. Later groups are dropped and generated again, so each prompt is trained on once in the history that
survives. The effect is that of resuming the run from c, except that the rollout workers stay up. Rows of
`metrics.jsonl` after c are removed; other loggers keep theirs.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from tora.errors import ComponentError, LearnerLost, SyncError, TrainingError, described
from tora.run.checkpoints import RunState
from tora.run.disk import is_full
from tora.run.loop import Outcome, train
from tora.run.run import Run

_log = logging.getLogger(__name__)


def train_and_export(run: Run) -> Outcome:
    """`train`, then export the policy into `run.result_folder`.

    A run that an error ends is saved first, unless the error is the learner's, an engine's that serves another policy,
    or a full disk's. Raises ComponentError with what it can be continued from if the config's optimizer, schedule or
    loss raises, and LearnerLost if a learner is lost after `max_learner_restarts` restarts from one checkpoint;
    `run.state` is then that of the newest checkpoint.
    """
    try:
        return _train_and_export(run)
    finally:
        run.checkpoints.wait()


def _train_and_export(run: Run) -> Outcome:
    limit, losses, restarted_from = run.cfg.max_learner_restarts, 0, -1
    while True:
        try:
            if losses:
                run.let_save(False)  # until the new learner trains, the newest checkpoint has everything
                run.learner = run.make_learner()
                if (folder := run.checkpoints.newest()) is not None:
                    run.learner.restore(folder)
            outcome = train(run)
            run.export()
            return outcome
        except ComponentError as error:
            folder = run.checkpoints.newest()  # an update half made is not worth saving
            how = f"resume_from_checkpoint=true continues from {folder.name}" if folder else "no checkpoint yet"
            raise ComponentError(f"{error} in step {run.state.step + 1}; {how}.") from error
        except LearnerLost as error:
            with suppress(Exception):
                run.checkpoints.end()  # one that it was writing is lost with it
            folder = run.checkpoints.newest()
            run.state.assign(run.checkpoints.read(folder, run.prompt_at) if folder else RunState())
            losses = losses + 1 if run.state.step == restarted_from else 1
            restarted_from = run.state.step
            if losses > limit:
                step = run.state.step
                how = f"resume_from_checkpoint=true continues from step {step}" if folder else "there is no checkpoint"
                raise LearnerLost(f"{error}, and max_learner_restarts={limit} is used up; {how}.") from error
            if run.stop_requested():
                raise LearnerLost(f"{error} while the run was stopping") from error
            _log.warning("%s; restarting it from step %d", error, run.state.step)
            run.is_stepping = False
            run.rollouts.rewind(run.state.rollouts, run.state.step)
            run.log.rewind(run.state.step)
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, SyncError | TrainingError) and not is_full(error):
                _save(run)  # the learner is sound: rollouts, a reward or a row of the data ended the run
            raise


def _save(run: Run) -> None:
    """Not at the price of the error that ends the run."""
    try:
        run.save_after_failure()
    except Exception as error:
        _log.warning("no checkpoint of step %d: %s", run.state.step, described(error))
