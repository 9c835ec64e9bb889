"""Checkpoints of a run. Each is written under a temporary name, sealed and renamed, so a folder is complete or absent,
and one that was damaged later is noticed."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from tora.errors import ConfigError
from tora.protocols import Learner
from tora.run.group_files import load_groups, save_groups
from tora.run.manifest import damage, seal, sync_folder
from tora.types import Prompt, RolloutState

_STATE = "run_state.json"
_NAME = re.compile(r"step_\d{6,}")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RunState:
    """The loop's part of a checkpoint; the learner writes its own files beside it."""

    step: int = 0
    """Completed steps; equals the policy version."""
    rollouts: RolloutState = field(default_factory=RolloutState)
    seconds: float = 0.0
    """Training time so far."""
    best_reward: float | None = None
    """The highest held-out reward so far."""
    evals_since_best: int = 0
    """Evaluations since then."""
    run_id: str = ""
    """See `tora.run.identity`; empty in a checkpoint that has none."""

    def assign(self, other: RunState) -> None:
        """Copy `other`'s fields, for holders of this object. An empty `run_id` leaves this one's."""
        run_id = other.run_id or self.run_id
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))
        self.run_id = run_id


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


class Checkpoints:
    """Folders `FOLDER/step_000010`, ...; only the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int, *, is_writer: bool = True) -> None:
        """`is_writer`: this rank writes. Every rank must call `save`, which is collective for the learners."""
        self._folder, self._keep, self.is_writer = folder, keep, is_writer
        self._damaged: list[Path] = []
        self._files = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def newest(self) -> Path | None:
        """The newest intact checkpoint, after the one that is being written; newer ones that are damaged are named in a
        warning, once each. None if there is no intact one."""
        self.wait()
        for folder in reversed(self._all()):
            clause = damage_of(folder)
            if clause is None:
                return folder
            if folder not in self._damaged:
                self._damaged.append(folder)
                _log.warning("checkpoint %s is damaged and left out: %s", folder, clause)
        return None

    def to_resume(self, *, may_start: bool = False) -> Path | None:
        """`newest`; None without any checkpoint if the run `may_start` instead.

        Raises ConfigError if there is none otherwise, or none that is intact, and names what is damaged: a run that has
        lost its checkpoints is not started over without being told to.
        """
        folder = self.newest()
        if folder is None:
            damaged = [f"{bad.name} is damaged: {damage_of(bad)}" for bad in self._all()]
            asked = f"resume_from_checkpoint={'auto' if may_start else 'true'}"
            if damaged:
                raise ConfigError(f"{asked}, but {self._folder} holds no intact checkpoint; {'; '.join(damaged)}")
            if not may_start:
                raise ConfigError(f"{asked}, but {self._folder} holds no checkpoint")
        return folder

    def folder_of(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Of all checkpoints, damaged ones too, in order."""
        return [step_of(folder) for folder in self._all()]

    def _all(self) -> list[Path]:
        """By step. A folder of another name, as a user's copy, is none of ours."""
        return sorted((path for path in self._folder.glob("step_*") if _NAME.fullmatch(path.name)), key=step_of)

    def save(self, state: RunState, learner: Learner, *, replaces: bool = True) -> None:
        """`begin` and `end`. Raises OSError or SafetensorError if it cannot be written; the checkpoints before it stay
        as they are."""
        self.begin(state, learner, replaces=replaces)
        self.end()

    def begin(self, state: RunState, learner: Learner, *, replaces: bool = True) -> None:
        """Begin to write a checkpoint of what there is now, after the one that is being written. `replaces`: it takes
        the place of the oldest one kept. False deletes none.

        Raises what the save before did.
        """
        self.end()
        final = self.folder_of(state.step)
        temporary = self._folder / f".{final.name}"
        if not self.is_writer:
            learner.begin_save(temporary)
            return
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that died while writing
        try:
            temporary.mkdir(parents=True)
            learner.begin_save(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        held = replace(state, rollouts=replace(state.rollouts))
        self._writing = self._files.submit(self._finish, temporary, final, held, learner, replaces)

    def end(self) -> None:
        """Returns once nothing is being written. Raises what the last `begin` could not write, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def wait(self) -> None:
        """Returns once nothing is being written, and leaves it to `end` to say what could not be."""
        if self._writing is not None:
            wait([self._writing])

    def _finish(self, temporary: Path, final: Path, state: RunState, learner: Learner, replaces: bool) -> None:
        """In a thread of its own."""
        try:
            learner.end_save()
            self._write(temporary, state)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(self._folder)
        for old in self._all()[: -self._keep] if replaces else ():
            shutil.rmtree(old)

    @staticmethod
    def _write(temporary: Path, state: RunState) -> None:
        save_groups(temporary, state.rollouts.finished)
        document = {
            "run_id": state.run_id,
            "step": state.step,
            "seconds": state.seconds,
            "best_reward": state.best_reward,
            "evals_since_best": state.evals_since_best,
            "cursor": state.rollouts.cursor,
            "pending": state.rollouts.pending,
        }
        (temporary / _STATE).write_text(json.dumps(document))
        seal(temporary)

    @staticmethod
    def read(folder: Path, prompt_at: Callable[[int], Prompt]) -> RunState:
        """The state in a checkpoint folder, without the learner's.

        Raises ConfigError if the prompt stream no longer yields the prompts of the checkpoint's groups.
        """
        document = json.loads((folder / _STATE).read_text())
        rollouts = RolloutState(document["cursor"], document["pending"], load_groups(folder, prompt_at))
        best, since = document.get("best_reward"), document.get("evals_since_best", 0)  # absent from older checkpoints
        return RunState(document["step"], rollouts, document["seconds"], best, since, document.get("run_id", ""))


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as a clause; None if it is intact."""
    if (clause := damage(folder)) is not None:
        return clause
    try:
        step = json.loads((folder / _STATE).read_text())["step"]
    except OSError:  # the manifest is whole, but of another folder
        return f"{_STATE} is missing"
    # a folder that was renamed would be taken for the newest one for ever
    return None if step == step_of(folder) else f"it holds step {step}"
