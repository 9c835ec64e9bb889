"""A `RolloutWorker` in a Ray actor, as the pool sees it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from actors.worker import RolloutWorker
from tora.errors import WorkerLost
from tora.types import GroupResult, LogprobRequest, Occupancy, Prompt, SnapshotRef, SyncReport

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 20
_NO_ROOM_AFTER_S = 60
_log = logging.getLogger(__name__)


class RolloutActor(RolloutWorker):
    """A `RolloutWorker` that is built when it is told to, so that waiting for room and starting can be told apart."""

    def __init__(self) -> None:
        """Builds nothing; see `boot`."""

    def placed(self) -> None:
        """Answers once the cluster has found room for this actor."""

    def boot(self, arguments: Mapping[str, Any]) -> None:
        super().__init__(**arguments)


class RayWorker:
    def __init__(self, arguments: Mapping[str, Any], **options: Any) -> None:
        """Asks Ray for an actor; see `start`. `arguments`: `RolloutWorker`'s. `options`: Ray's for the actor.

        Ray itself restarts nothing: its restarted actor would serve the base model until somebody noticed.
        """
        self._arguments, self._options = arguments, options
        self._actor = ray.remote(RolloutActor).options(**options).remote()

    async def start(self, limit_s: float) -> None:
        """Waits for room in the cluster as long as it takes, and for the engine `limit_s` at most."""
        placed = asyncio.ensure_future(_answer(self._actor.placed.remote()))
        done, _ = await asyncio.wait({placed}, timeout=_NO_ROOM_AFTER_S)
        if not done:
            needs = {name: self._options.get(name) for name in ("num_cpus", "num_gpus")}
            free = await asyncio.to_thread(ray.available_resources)
            _log.warning("a rollout worker waits for room in the cluster: it needs %s, free are %s", needs, free)
        await placed
        try:
            await asyncio.wait_for(_answer(self._actor.boot.remote(self._arguments)), limit_s)
        except TimeoutError as error:
            raise WorkerLost(f"its engine did not start within {limit_s:g} s") from error

    async def run_group(self, prompt: Prompt) -> GroupResult:
        return await _answer(self._actor.run_group.remote(prompt))

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[GroupResult]:
        return await _answer(self._actor.evaluate.remote(list(prompts)))

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]:
        return await _answer(self._actor.logprobs.remote(list(requests), adapter=adapter))

    async def forward(self, snapshot: SnapshotRef) -> SyncReport:
        """Ray hands the actor the bytes from its node's object store."""
        return await _answer(self._actor.forward.remote(snapshot.data))

    async def occupancy(self) -> Occupancy:
        return await _answer(self._actor.occupancy.remote())

    async def close(self) -> None:
        """Gives the engine time to end its own processes, then ends the Ray actor."""
        try:
            await asyncio.wait_for(_answer(self._actor.close.remote()), _CLOSE_TIMEOUT_S)
        except (WorkerLost, TimeoutError):
            pass  # it is gone, or it hangs: killed either way
        finally:
            self.kill()

    def kill(self) -> None:
        ray.kill(self._actor)  # pyright: ignore[reportArgumentType]  Ray's types know handles by another class


async def _answer(ref: Awaitable[T]) -> T:
    """Errors: WorkerLost for a dead or unreachable actor; what its method raised as itself."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error  # which holds the far side's traceback
        raise
    except RayError as error:
        reason = str(error).strip().splitlines()
        raise WorkerLost(f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}") from error
