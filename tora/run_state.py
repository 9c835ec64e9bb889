"""Where a run stands, and the folders that say so. Written aside and renamed, so that a folder is whole or absent."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tora.protocols import Learner

_STATE = "run_state.json"


@dataclass(slots=True)
class RunState:
    """What the loop resumes; the learner keeps its own state beside it."""

    step: int = 0
    """Steps done; equals the policy version."""
    rollouts: dict[str, Any] = field(default_factory=dict)
    """`Rollouts.state()`: prompt cursor and prompts in flight."""
    seconds: float = 0.0
    """Training time so far."""


class Checkpoints:
    """`FOLDER/step_000010`, ...; the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int, *, is_writer: bool = True) -> None:
        """Of several peers, one writes; all must call `save`, which is collective for their learners."""
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
        (aside / _STATE).write_text(json.dumps(asdict(state)))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in sorted(self._folder.glob("step_??????"))[: -self._keep]:
            shutil.rmtree(old)

    @staticmethod
    def load(folder: Path, learner: Learner) -> RunState:
        learner.load(folder)
        return RunState(**json.loads((folder / _STATE).read_text()))
