"""The evaluations of a run: when one begins, and what becomes of its result.

Behind training, an evaluation runs under the version that it began with, on what room training leaves, and its result
is logged with the step of that version when it arrives. There is at most one at a time: the next waits for the last.
The run ends with an evaluation of its last policy. One that a stop cuts short has no result.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tora.config.schema import RunConfig
from tora.reporting.evaluation import EvalResult, passes_by, summarize_sets
from tora.rewards.accuracy import accuracy_reward
from tora.run.best import is_best, stops_early
from tora.run.run import Run
from tora.types import Group


def evaluates_behind(cfg: RunConfig) -> bool:
    """Whether the run trains on while it is evaluated. Engines hold no second version of whole weights."""
    return cfg.eval is not None and not cfg.eval.blocking and cfg.async_rl and not cfg.model.trains_whole


class Evaluations:
    """Of one call of `tora.run.loop.train`."""

    def __init__(self, run: Run) -> None:
        self._run, self._behind = run, evaluates_behind(run.cfg)
        self.before: EvalResult | None = None
        """Of the policy that training began with; None if it was not evaluated."""
        self.before_step = run.state.step
        """The step after which this process began."""
        self.after: EvalResult | None = None
        """The last one after a step; None if there is none."""
        self.after_step = 0
        """The step after which it was measured."""
        self._running: int | None = None
        """The version that is being evaluated."""

    def at_start(self) -> None:
        run = self._run
        if run.cfg.eval is not None and run.cfg.eval.at_start:
            self._start()
            self._collect(wait=run.state.step >= run.cfg.num_steps)  # no step will

    def after_a_step(self, *, last: bool) -> bool:
        """Log what has arrived, and begin another evaluation if one is due, as after the run's `last` step. Returns
        whether `eval.early_stop` ends the run."""
        run, cfg = self._run, self._run.cfg.eval
        if cfg is None:
            return False
        arrived = self._collect()
        if last or run.state.step % cfg.every == 0:
            arrived = self._start() or arrived
        ends = arrived and not last and stops_early(run.state, cfg)
        if last or ends:
            self._finish()
        return ends

    def _finish(self) -> None:
        """The policy of this step has a result, unless a stop is requested."""
        self._collect(wait=True)
        if self.after_step != self._run.state.step:
            self._start()
            self._collect(wait=True)
        if self._behind:
            shutil.rmtree(self._candidate, ignore_errors=True)

    def _start(self) -> bool:
        """Whether a result arrived meanwhile."""
        run, arrived = self._run, self._collect(wait=True)
        if self._running is not None:  # a stop is requested
            return arrived
        assert run.cfg.eval is not None
        if self._behind and run.cfg.eval.keep_best:
            run.learner.export(self._candidate)  # the learner will have another policy when the result is here
        self._running = run.state.step
        run.rollouts.start_evaluation(pinned=self._behind)
        return (not self._behind and self._collect(wait=True)) or arrived

    def _collect(self, *, wait: bool = False) -> bool:
        """Whether a result arrived."""
        if self._running is None or (groups := self._run.rollouts.evaluated(wait=wait)) is None:
            return False
        step, self._running = self._running, None
        result = self._record(step, groups)
        if step == self.before_step:
            self.before = result
        else:
            self.after, self.after_step = result, step
        return True

    def _record(self, step: int, groups: Sequence[Group]) -> EvalResult:
        """Log the results of all sets; returns that of `eval.dataset`."""
        run, cfg = self._run, self._run.cfg.eval
        assert cfg is not None
        passes = passes_by(accuracy_reward(run.cfg.rewards))
        results = summarize_sets(groups, run.eval_sets, cfg.samples, passes)
        for result in results:
            run.log.evaluation(step, result)
        main = results[0]
        if main.sample is not None:
            run.log.sample(*main.sample)
        if is_best(run.state, main) and cfg.keep_best:
            self._keep()
        return main

    def _keep(self) -> None:
        best = self._run.best_folder
        if not self._behind:
            self._run.learner.export(best)
            return
        best.mkdir(exist_ok=True)
        for file in self._candidate.iterdir():
            file.replace(best / file.name)

    @property
    def _candidate(self) -> Path:
        """The policy that is being evaluated, until it is known whether it is the best."""
        return self._run.best_folder.with_name(".best")
