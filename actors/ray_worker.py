"""A `RolloutWorker` in a Ray actor, as the pool sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from tora.types import Group, Prompt, ScoreRequest, SyncReport

_CLOSE_TIMEOUT_S = 20


class RayWorker:
    def __init__(self, actor: Any) -> None:
        """`actor`: handle of a Ray actor whose class is `RolloutWorker`, threaded."""
        self._actor = actor

    async def run_group(self, prompt: Prompt) -> Group:
        return await self._actor.run_group.remote(prompt)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[Group]:
        return await self._actor.evaluate.remote(list(prompts))

    async def score(self, requests: Sequence[ScoreRequest], adapter: bool) -> list[np.ndarray]:
        return await self._actor.score.remote(list(requests), adapter=adapter)

    async def load_snapshot(self, snapshot: Any) -> SyncReport:
        """`snapshot` is an ObjectRef; Ray hands the actor the bytes from its node's object store."""
        return await self._actor.load_snapshot.remote(snapshot)

    def close(self) -> None:
        """Gives the engine time to end its own processes, then ends the Ray actor."""
        ray.wait([self._actor.close.remote()], timeout=_CLOSE_TIMEOUT_S)
        ray.kill(self._actor)
