"""Run: every object that the training loop works with, assembled by `tora.launch.launcher`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tora.batching.train_batch import group_advantages
from tora.config.schema import RunConfig
from tora.protocols import Learner, Rollouts
from tora.reporting.evaluation import EvalResult
from tora.reporting.uploads import UPLOADS, Uploads
from tora.run.canary import Canary
from tora.run.checkpoints import Checkpoints, RunState
from tora.run.identity import result_name, write_identity
from tora.types import Group, Metrics, Prompt, Rollout, TrainBatch


class Log(Protocol):
    """Where metrics go; `tora.reporting.metrics` implements it. Only the loop and its recovery log."""

    def step(self, step: int, metrics: Metrics, prompt_ids: Sequence[int]) -> None: ...

    def evaluation(self, step: int, result: EvalResult) -> None: ...

    def sample(self, prompt: Prompt, rollout: Rollout) -> None: ...

    def completions(self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]]) -> None:
        """The step's rollouts; `advantages` are those of each group's."""
        ...

    def warning(self, sentence: str) -> None:
        """Show a message to the user; writes no row."""
        ...

    def rewind(self, step: int) -> None:
        """Drop what was logged from this step on; the run repeats it."""
        ...


@dataclass(slots=True)
class Run:
    """One run, from its first step or from a checkpoint. Recovery replaces `learner` and rewinds `state`; everything
    else stays for the whole run."""

    cfg: RunConfig
    folder: Path
    """The run's output folder."""
    learner: Learner
    make_learner: Callable[[], Learner]
    """Starts a learner to replace a lost one, at version 0."""
    rollouts: Rollouts
    canary: Canary
    log: Log
    checkpoints: Checkpoints
    state: RunState
    prompt_at: Callable[[int], Prompt]
    """The prompt stream, by prompt id."""
    is_alone: bool
    """Whether no other rank runs this loop beside this one, so that it may save whatever happens to it."""
    stop_requested: Callable[[], bool]
    """Whether the user asked the run to stop. Collective if the run has several ranks."""
    let_save: Callable[[bool], object] = lambda saves: None
    """Called with whether a stop from now on leaves the run time to save. Where there is nothing to save, the process
    ends at once."""
    tries_adapter: bool = False
    """Whether a random adapter is served and checked before the first policy."""
    eval_sets: Mapping[str, int] = field(default_factory=dict)
    """The number of prompts of each held-out set, by name."""

    uploads: Uploads | None = None
    """Of the rank that uploads policies to the hub."""
    is_stepping: bool = field(default=False, init=False)
    """Whether the learner is in a step, or was when it failed: its weights may be changed in part."""
    _saving: int = field(default=0, init=False)
    """The step of the checkpoint that is being written."""

    @property
    def result_folder(self) -> Path:
        """Where the trained policy is exported."""
        return self.folder / result_name(self.cfg)

    @property
    def best_folder(self) -> Path:
        """Where the policy with the highest held-out reward is exported, with `eval.keep_best`."""
        return self.folder / "best"

    def publish(self, version: int) -> Metrics:
        """Send the learner's policy to every engine and prove that they serve it. `version` is the learner's.

        Raises SyncError if an engine does not serve it.
        """
        metrics = self.rollouts.publish(self.learner.snapshot())
        return {**metrics, **self.canary.check(version, self.learner, self.rollouts)}

    def try_out(self) -> None:
        """Prove with a random adapter that every engine applies the learner's, where `tries_adapter`. A new adapter
        changes nothing, so that the first sync alone would prove nothing of it.

        Raises SyncError if an engine does not.
        """
        if not self.tries_adapter:
            return
        self.learner.try_out(True)
        try:
            self.rollouts.publish(self.learner.snapshot(), generates=False)
            self.canary.try_out(self.learner, self.rollouts)
        finally:
            self.learner.try_out(False)
        self.tries_adapter = False

    def export(self) -> None:
        """Write the trained policy into `result_folder`, with the run's identity beside it."""
        self.learner.export(self.result_folder)
        if self.checkpoints.is_writer:
            write_identity(self.result_folder, self.state.run_id, self.state.step)

    def push(self) -> None:
        """Begin to upload the policy to the hub if the config asks for that of every checkpoint. Collective."""
        if not self.cfg.push_to_hub or self.cfg.hub_strategy != "every_save":
            return
        exported = self.folder / UPLOADS / f"step_{self.state.step:06d}"
        try:
            self.learner.export(exported)
        except OSError as error:
            self.log.warning(f"step {self.state.step} is not uploaded: {error}")
            return
        if self.uploads is not None:
            self.uploads.start(exported, self.state.step)

    def log_completions(self, step: int, batch: TrainBatch) -> None:
        """Log the rollouts of every `log_completions`-th step, the first among them."""
        if self.cfg.log_completions and step % self.cfg.log_completions == 0:
            self.log.completions(step, batch.groups, group_advantages(self.cfg, batch.groups))

    def save_after_failure(self) -> None:
        """Write a checkpoint of what the learner has, if it is sound, there is none of it yet and the other ranks need
        not join."""
        if not self.is_alone or not self.state.step or self.is_stepping:
            return
        if self.checkpoints.folder_of(self.state.step) != self.checkpoints.newest():
            self.save(replaces=False)
            self.end_save()

    def save(self, *, replaces: bool) -> None:
        """Begin to write a checkpoint; one that the disk does not take is left out with a warning, now or at the next
        save, and the run goes on.

        `replaces`: see `Checkpoints.begin`.
        """
        self.end_save()
        self.state.rollouts = self.rollouts.state()
        with self._unsaved(self.state.step):
            self.checkpoints.begin(self.state, self.learner, replaces=replaces)
            self._saving = self.state.step

    def end_save(self) -> None:
        """Wait for the checkpoint that is being written."""
        with self._unsaved(self._saving):
            self.checkpoints.end()

    @contextmanager
    def _unsaved(self, step: int) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            self.log.warning(f"no checkpoint of step {step}: {error}")
