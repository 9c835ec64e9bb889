"""Checkpoints of a run. Each is written under a temporary name and renamed, so a folder is complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tora.protocols import Learner
from tora.run.group_files import load_groups, save_groups
from tora.types import Prompt, RolloutState

_STATE = "run_state.json"


@dataclass(slots=True)
class RunState:
    """The loop's part of a checkpoint; the learner writes its own files beside it."""

    step: int = 0
    """Completed steps; equals the policy version."""
    rollouts: RolloutState = field(default_factory=RolloutState)
    seconds: float = 0.0
    """Training time so far."""

    def assign(self, other: RunState) -> None:
        """Copy `other`'s fields, for holders of this object."""
        self.step, self.rollouts, self.seconds = other.step, other.rollouts, other.seconds


class Checkpoints:
    """Folders `FOLDER/step_000010`, ...; only the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int, *, is_writer: bool = True) -> None:
        """`is_writer`: this rank writes. Every rank must call `save`, which is collective for the learners."""
        self._folder, self._keep, self._is_writer = folder, keep, is_writer

    def newest(self) -> Path | None:
        found = sorted(self._folder.glob("step_??????"))
        return found[-1] if found else None

    def save(self, state: RunState, learner: Learner, *, replaces: bool = True) -> None:
        """`replaces`: it takes the place of the oldest one kept. False deletes none."""
        final = self._folder / f"step_{state.step:06d}"
        temporary = self._folder / f".{final.name}"
        if not self._is_writer:
            learner.save(temporary)
            return
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that died while writing
        temporary.mkdir(parents=True)
        learner.save(temporary)
        save_groups(temporary, state.rollouts.finished)
        document = {
            "step": state.step,
            "seconds": state.seconds,
            "cursor": state.rollouts.cursor,
            "pending": state.rollouts.pending,
        }
        (temporary / _STATE).write_text(json.dumps(document))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in sorted(self._folder.glob("step_??????"))[: -self._keep] if replaces else ():
            shutil.rmtree(old)

    @staticmethod
    def read(folder: Path, prompt_at: Callable[[int], Prompt]) -> RunState:
        """The state in a checkpoint folder, without the learner's.

        Raises ConfigError if the prompt stream no longer yields the prompts of the checkpoint's groups.
        """
        document = json.loads((folder / _STATE).read_text())
        rollouts = RolloutState(document["cursor"], document["pending"], load_groups(folder, prompt_at))
        return RunState(document["step"], rollouts, document["seconds"])
