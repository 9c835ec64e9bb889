"""Where a run stands, and the folders that say so. Written aside and renamed, so that a folder is whole or absent."""

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
    """What the loop resumes; the learner keeps its own state beside it."""

    step: int = 0
    """Steps done; equals the policy version."""
    rollouts: RolloutState = field(default_factory=RolloutState)
    seconds: float = 0.0
    """Training time so far."""

    def assign(self, other: RunState) -> None:
        self.step, self.rollouts, self.seconds = other.step, other.rollouts, other.seconds


class Checkpoints:
    """`FOLDER/step_000010`, ...; the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int, *, is_writer: bool = True) -> None:
        """Of several ranks, one writes; all must call `save`, which is collective for their learners."""
        self._folder, self._keep, self._is_writer = folder, keep, is_writer

    def newest(self) -> Path | None:
        found = sorted(self._folder.glob("step_??????"))
        return found[-1] if found else None

    def save(self, state: RunState, learner: Learner) -> None:
        final = self._folder / f"step_{state.step:06d}"
        aside = self._folder / f".{final.name}"
        if not self._is_writer:
            learner.save(aside)
            return
        shutil.rmtree(aside, ignore_errors=True)  # left by a run that died while writing
        aside.mkdir(parents=True)
        learner.save(aside)
        save_groups(aside, state.rollouts.finished)
        document = {
            "step": state.step,
            "seconds": state.seconds,
            "cursor": state.rollouts.cursor,
            "pending": state.rollouts.pending,
        }
        (aside / _STATE).write_text(json.dumps(document))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in sorted(self._folder.glob("step_??????"))[: -self._keep]:
            shutil.rmtree(old)

    @staticmethod
    def read(folder: Path, prompt_at: Callable[[int], Prompt]) -> RunState:
        """All but the learner's own state. Errors: ConfigError where the prompts are not the run's any more."""
        document = json.loads((folder / _STATE).read_text())
        rollouts = RolloutState(document["cursor"], document["pending"], load_groups(folder, prompt_at))
        return RunState(document["step"], rollouts, document["seconds"])
