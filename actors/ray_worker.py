"""A `RolloutWorker` in a Ray actor, and the pool's handle to it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from actors.packed_group import packed, packed_call, unpacked, unpacked_call
from actors.worker import RolloutWorker
from tora.config.components import import_from
from tora.config.schema import RunConfig
from tora.distributed.ray_logs import keep_log
from tora.distributed.versions import differences, installed
from tora.errors import SnapshotLost, WorkerLost, portable_errors
from tora.protocols import Occupancy
from tora.types import GroupResult, LogprobRequest, PolicySnapshot, Prompt, SnapshotRef, SyncReport

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 20
_LOWEST_PRIORITY = 19
WARN_UNPLACED_EVERY_S = 60
_log = logging.getLogger(__name__)


class RolloutActor(RolloutWorker):
    """A `RolloutWorker` that is built after its actor is placed, so that only building it counts as starting."""

    def __init__(self) -> None:
        """Builds nothing; see `build`."""

    def ping(self) -> int:
        """This process's id, as soon as the cluster has placed this actor."""
        return os.getpid()

    def versions(self) -> dict[str, str]:
        return installed()

    def build(self, arguments: Mapping[str, Any], folders: Sequence[str], gives_way: bool = False) -> None:
        """`folders`: to import components from. `gives_way`: its engine and its evaluations run when nothing else
        wants their processor. What it answers to heartbeats is not held up."""
        import_from(folders)
        self._gives_way = gives_way
        if gives_way:
            _give_way()  # threads that this one starts, the engine's among them, do too
        with portable_errors():
            super().__init__(**arguments)

    def run_group(self, prompt: Prompt, ticket: int = 0) -> GroupResult:
        with portable_errors():
            return super().run_group(prompt, ticket)

    def run_group_packed(self, *call: bytes) -> bytes:
        """`run_group` of a `packed_call`. The result is `packed`."""
        return packed(self.run_group(*unpacked_call(*call)))

    def evaluate(self, prompts_P: Sequence[Prompt], pinned: PolicySnapshot | None = None) -> list[GroupResult]:
        if self._gives_way:
            _give_way()
        with portable_errors():
            return super().evaluate(prompts_P, pinned)

    def evaluate_packed(self, prompts_P: Sequence[Prompt], pinned: PolicySnapshot | None = None) -> list[bytes]:
        """`evaluate` with each result `packed`."""
        return list(map(packed, self.evaluate(prompts_P, pinned)))

    def forward(self, snapshot: PolicySnapshot) -> SyncReport:
        with portable_errors():
            return super().forward(snapshot)

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> list[np.ndarray]:
        with portable_errors():
            return super().logprobs(requests, adapter=adapter)


def _give_way() -> None:
    """The calling thread, and those that it starts, run when nothing else wants their processor. Where the system has
    no such policy, this process gets the lowest priority."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # Ray's workers have a niceness of 15 anyway
    else:
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_PRIORITY)


FindPlace = Callable[[], tuple[Any, Callable[[], object]]]
"""Returns Ray's scheduling strategy of a worker, and what to call once it is killed."""


def anywhere() -> tuple[Any, Callable[[], object]]:
    return "SPREAD", lambda: None


def ray_workers(arguments: Mapping[str, Any], cfg: RunConfig, **options: Any) -> Callable[..., RayWorker]:
    """Makes workers. `arguments` go to `RolloutWorker`, and are pickled once for all of them: a tokenizer takes long.
    `options` go to the actor. What this returns takes the other arguments of `RayWorker`."""
    return partial(RayWorker, ray.put(dict(arguments)), cfg, **options)


class RayWorker:
    def __init__(
        self,
        arguments: ray.ObjectRef,
        cfg: RunConfig,
        find_place: FindPlace = anywhere,
        gives_way: bool = False,
        **options: Any,
    ) -> None:
        """Requests an actor from Ray. See `ray_workers`. `find_place` is asked once. `gives_way`: see
        `RolloutActor.build`.

        The pool restarts lost actors, not Ray: an actor that Ray restarted would serve the base model.
        """
        self._arguments, self._options, self._tickets = arguments, options, count()
        self._gives_way = gives_way
        self._folders, self._output_dir = cfg.import_from or [], cfg.output_dir
        self._pid: int | None = None
        place, self._on_kill = find_place()
        self._actor = ray.remote(RolloutActor).options(scheduling_strategy=place, **options).remote()

    async def start(self, limit_s: float) -> None:
        """Waits without limit for room in the cluster, then at most `limit_s` seconds for the engine."""
        placed = asyncio.ensure_future(_result(self._actor.ping.remote()))
        while not (await asyncio.wait({placed}, timeout=WARN_UNPLACED_EVERY_S))[0]:
            needs = {name: self._options.get(name) for name in ("num_cpus", "num_gpus", "resources")}
            free = await asyncio.to_thread(ray.available_resources)
            _log.warning("a rollout worker is waiting for room in the cluster: it needs %s; free: %s", needs, free)
        self._pid = await placed
        if clause := differences(installed(), await _result(self._actor.versions.remote())):
            _log.warning("the node of a rollout worker %s", clause)
        building = _result(self._actor.build.remote(self._arguments, self._folders, self._gives_way))
        try:
            await asyncio.wait_for(building, limit_s)
        except TimeoutError as error:
            raise WorkerLost(f"its engine did not start within {limit_s:g} s") from error

    async def run_group(self, prompt: Prompt) -> GroupResult:
        """A call that is cancelled is aborted in the engine."""
        ticket = next(self._tickets)
        try:
            return unpacked(await _result(self._actor.run_group_packed.remote(*packed_call(prompt, ticket))))
        except asyncio.CancelledError:
            self._actor.abort.remote(ticket)
            raise

    async def evaluate(self, prompts: Sequence[Prompt], pinned: SnapshotRef | None = None) -> list[GroupResult]:
        evaluate = self._actor.evaluate_packed.remote
        if pinned is None:
            results = await _result(evaluate(list(prompts)))
        else:
            results = await _with_snapshot(evaluate(list(prompts), pinned.data), pinned)
        return list(map(unpacked, results))

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]:
        return await _result(self._actor.logprobs.remote(list(requests), adapter=adapter))

    async def forward(self, snapshot: SnapshotRef) -> SyncReport:
        """The actor reads the bytes from its node's object store. Raises SnapshotLost if no node has them any more."""
        return await _with_snapshot(self._actor.forward.remote(snapshot.data), snapshot)

    async def occupancy(self) -> Occupancy:
        return await _result(self._actor.occupancy.remote())

    async def close(self) -> None:
        """Gives the engine time to shut down its own processes, then kills the Ray actor."""
        try:
            await asyncio.wait_for(_result(self._actor.close.remote()), _CLOSE_TIMEOUT_S)
        except (WorkerLost, TimeoutError):
            pass  # dead or hung: kill it either way
        finally:
            self.kill()

    def keep_log(self) -> str:
        return "" if self._pid is None else keep_log(self._pid, self._output_dir, f"rollout_worker_{self._pid}")

    def kill(self) -> None:
        ray.kill(self._actor)  # pyright: ignore[reportArgumentType]  Ray's types know handles by another class
        self._on_kill()
        self._on_kill = lambda: None


async def _with_snapshot(ref: Awaitable[T], snapshot: SnapshotRef) -> T:
    """As `_result`. Raises SnapshotLost if no node has the snapshot's bytes any more."""
    try:
        return await _result(ref)
    except WorkerLost as error:
        cause = error.__cause__.cause if isinstance(error.__cause__, RayTaskError) else error.__cause__
        if isinstance(cause, ObjectLostError):
            raise SnapshotLost(f"policy version {snapshot.version} is lost ({type(cause).__name__})") from error
        raise


async def _result(ref: Awaitable[T]) -> T:
    """The answer. Raises WorkerLost if the actor is dead or unreachable, else whatever its method raised."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, RayError):
            raise WorkerLost(f"its argument is lost ({type(error.cause).__name__})") from error
        if isinstance(error.cause, Exception):
            raise error.cause from error  # `error` holds the actor's traceback
        raise
    except RayError as error:
        reason = str(error).strip().splitlines()
        raise WorkerLost(f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}") from error
