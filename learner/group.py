"""LearnerGroup: learner ranks in Ray actors, behind the four methods of one `Learner`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from tora.types import StepResult, TrainBatch


class LearnerGroup:
    """Blocks on its ranks. `snapshot` answers a reference, not bytes."""

    def __init__(self, ranks: Sequence[Any]) -> None:
        """`ranks` are Ray actor handles of `Learner`, rank 0 first."""
        self._ranks = list(ranks)

    def _all(self, method: str, *args: Any) -> list[Any]:
        return ray.get([getattr(rank, method).remote(*args) for rank in self._ranks])

    def step(self, batch: TrainBatch) -> StepResult:
        return self._all("step", ray.put(batch))[0]

    def snapshot(self) -> Any:
        """An ObjectRef that this process owns, so it outlives the learner; its bytes go straight to the workers."""
        refs = [rank.snapshot.remote() for rank in self._ranks]
        ray.wait(refs, num_returns=len(refs), fetch_local=False)
        return refs[0]

    def save(self, folder: Path) -> None:
        self._all("save", folder)

    def load(self, folder: Path) -> None:
        self._all("load", folder)

    def export(self, folder: Path) -> None:
        self._all("export", folder)
