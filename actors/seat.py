"""Seat: a place for one rollout worker, which is replaced when it dies, hangs or breaks.

    starting    a new worker waits for room in the cluster, then for its engine
    syncing     it installs the newest snapshot, and again if a newer one was published meanwhile
    up          it runs groups; a heartbeat shows that it is alive and how full its engine is
    lost        it is killed; its pending calls raise `WorkerLost`; after a delay a new worker starts

A worker is lost when a call raises an error that a new process may not hit again, when a call exceeds its time limit,
or when the heartbeat stops. A wrong snapshot (`SyncError`) or a wrong argument would fail again, so it fails the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from actors.buffer import Slot
from actors.concurrency import next_limit
from tora.config.schema import RolloutConfig
from tora.errors import ConfigError, ImageLost, SnapshotLost, SyncError, WorkerLost
from tora.protocols import Occupancy
from tora.types import GroupResult, LogprobRequest, Prompt, SyncReport

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatTiming:
    """When a seat checks and replaces its worker."""

    heartbeat_every_s: float = 2.0
    """Seconds between two heartbeats."""
    first_delay_s: float = 1.0
    """Seconds before a lost worker is replaced; doubled for each further worker lost without finishing a group."""
    max_delay_s: float = 60.0

    def restart_delay_s(self, failures: int) -> float:
        """Seconds before the next worker starts, after `failures` earlier losses in a row without a finished group."""
        return min(self.max_delay_s, self.first_delay_s * 2.0 ** min(failures, 32))


class WorkerHandle(Protocol):
    """A `RolloutWorker` in another process. `start` is called first, and nothing after `kill`."""

    async def start(self, limit_s: float) -> None:
        """Returns once the engine is ready. Raises WorkerLost if that takes longer than `limit_s` seconds."""
        ...

    async def run_group(self, prompt: Prompt) -> GroupResult: ...

    async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
        """`pinned`: the snapshot to use, which may be a reference; None for the newest."""
        ...

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]: ...

    async def forward(self, snapshot: Any) -> SyncReport:
        """`snapshot` may be a reference that only the worker resolves."""
        ...

    async def occupancy(self) -> Occupancy: ...

    async def close(self) -> None: ...

    def keep_log(self) -> str:
        """Keep what the worker's process printed. A clause that names the file; empty if there is none."""
        ...

    def kill(self) -> None: ...


class SeatEvents(Protocol):
    """What a seat reports to the pool, on the event loop."""

    def on_worker_up(self, seat: Seat) -> None:
        """A worker is ready for groups."""

    def on_worker_lost(self, seat: Seat, error: BaseException) -> None:
        """A worker failed with `error`. It is replaced after a delay."""

    def on_snapshot_lost(self, snapshot: Any) -> None:
        """No worker can load this snapshot any more."""

    def on_capacity(self) -> None:
        """A seat may take more groups than before."""


class Seat:
    def __init__(
        self,
        make_worker: Callable[[], WorkerHandle],
        latest_snapshot: Callable[[Any], Coroutine[Any, Any, Any]],
        cfg: RolloutConfig,
        number: int,
        *,
        events: SeatEvents,
        timing: SeatTiming,
    ) -> None:
        """`latest_snapshot` waits for the first one to be published, and for another than its argument."""
        self.number, self._make_worker, self._latest_snapshot = number, make_worker, latest_snapshot
        self._cfg, self._events, self._timing = cfg, events, timing
        self.up = False
        self.installed: Any = None
        """The last snapshot that the worker has installed."""
        self.report: SyncReport | None = None
        """The worker's answer to it."""
        self._installing = asyncio.Lock()
        self.limit = cfg.concurrency
        """Maximum number of groups in flight; see `actors.concurrency`."""
        self.slots: set[Slot] = set()
        """Groups in flight here."""
        self.outstanding_tokens = 0.0
        """Prompt and estimated completion tokens of the groups in flight."""
        self.num_evaluations = 0
        """Calls of `evaluate` in flight here; the caller counts them."""
        self.kept_log = ""
        """See `WorkerHandle.keep_log`; of the last worker that was lost."""
        self._failures = 0
        """Losses in a row, without a finished group, before the present worker."""
        self._worker: WorkerHandle | None = None
        self._lost: asyncio.Future[BaseException] | None = None
        """Resolves when the worker is lost, to the reason."""
        self._pause: asyncio.Future[None] | None = None
        """Resolves at the time of the next heartbeat, or when the worker is lost."""
        self._pending: set[asyncio.Timeout] = set()
        """The time limits of the calls to the worker; they end when it is lost."""

    async def run_forever(self) -> None:
        """Run forever, replacing each lost worker."""
        while True:
            self.installed = None
            self._lost = asyncio.get_running_loop().create_future()
            try:
                self._worker = self._make_worker()
                await self._worker.start(self._cfg.start_timeout_s)
                await self.catch_up()
                self.up = True
                self._events.on_worker_up(self)
                await self._watch()
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # the pool decides whether the run goes on
                self._discard_worker(error)
                self._events.on_worker_lost(self, error)
            await asyncio.sleep(self._timing.restart_delay_s(self._failures))
            self._failures += 1

    @property
    def losses_in_a_row(self) -> int:
        """Workers lost here since the last finished group. For a seat that has just lost one."""
        return self._failures + 1

    def reserve(self, slot: Slot, tokens: float) -> None:
        """Reserve capacity; call `run_group` next. `tokens`: prompt and expected completion tokens of the group."""
        self.slots.add(slot)
        self.outstanding_tokens += tokens

    async def run_group(self, slot: Slot, tokens: float) -> GroupResult:
        """Call `reserve` first. Raises as `_call` does."""
        try:
            result = await self._call(lambda worker: worker.run_group(slot.prompt), self._cfg.group_timeout_s)
        finally:
            self.release(slot, tokens)
        self._failures = 0
        return result

    def release(self, slot: Slot, tokens: float) -> None:
        """Undo `reserve`, once."""
        if slot in self.slots:
            self.slots.remove(slot)
            self.outstanding_tokens -= tokens

    async def evaluate(self, prompts: Sequence[Prompt], pinned: Any) -> list[GroupResult]:
        """Raises as `_call` does."""
        rounds = -(-len(prompts) // self._cfg.concurrency)
        limit_s = self._cfg.group_timeout_s * max(1, rounds)
        return await self._call(lambda worker: worker.evaluate(prompts, pinned), limit_s)

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]:
        """Raises as `_call` does."""
        return await self._call(lambda worker: worker.logprobs(requests, adapter), self._cfg.group_timeout_s)

    @property
    def version(self) -> int:
        """Groups that start here have this policy version or a newer one; -1 before the first snapshot."""
        return -1 if self.installed is None else self.installed.version

    async def catch_up(self) -> None:
        """Install the newest snapshot, and again if a newer one is published meanwhile; one that is lost is not waited
        for, but the next. Raises as `_call` does."""
        async with self._installing:
            lost = None
            while self.installed is not (newest := await self._latest_snapshot(lost)):
                try:
                    self.report = await self._call(lambda worker: worker.forward(newest), self._cfg.group_timeout_s)
                    self.installed = newest
                except SnapshotLost:
                    lost = newest
                    self._events.on_snapshot_lost(newest)

    async def close(self) -> None:
        """Close a worker that is up, kill any other. Cancel `run_forever` first."""
        if self._worker is None:
            return
        if self.up:
            await self._worker.close()
        else:
            self._worker.kill()

    async def _watch(self) -> None:
        """Send heartbeats until the worker is lost. Raises as `_call` does."""
        assert self._lost is not None
        loop = asyncio.get_running_loop()
        while True:
            if not self._lost.done():
                self._pause = loop.create_future()
                timer = loop.call_later(self._timing.heartbeat_every_s, _end, self._pause)
                await self._pause
                timer.cancel()
            occupancy = await self._call(lambda worker: worker.occupancy(), self._cfg.heartbeat_s)
            # the worker answers in another thread than the one that hangs
            if (seconds := occupancy.step_seconds) > (limit_s := self._cfg.heartbeat_s):
                raise WorkerLost(
                    f"its engine has been in one step for {seconds:.1f} s (rollout.heartbeat_s={limit_s:g})"
                )
            before = self.limit
            self.limit = next_limit(before, self._cfg.concurrency, len(self.slots), occupancy)
            if self.limit > before:
                self._events.on_capacity()

    async def _call(self, method: Callable[[WorkerHandle], Awaitable[T]], limit_s: float) -> T:
        """The worker's answer. Raises WorkerLost if the worker is lost first, and a fatal error as itself."""
        worker, lost = self._worker, self._lost
        if worker is None or lost is None or lost.done():
            raise WorkerLost(str(lost.result()) if lost and lost.done() else "it has not started")
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                self._pending.add(limit)
                try:
                    return await method(worker)
                finally:
                    self._pending.remove(limit)
        except Exception as error:
            if is_fatal(error) or isinstance(error, SnapshotLost | ImageLost):
                raise
            self._mark_lost(WorkerLost(f"it did not answer within {limit_s:g} s") if limit.expired() else error)
            raise WorkerLost(str(lost.result())) from lost.result()

    def _mark_lost(self, error: BaseException) -> None:
        """Fail all pending calls to the worker and refuse new ones."""
        self.up = False
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(error)
            _end(self._pause)
            for limit in self._pending:
                if not limit.expired():
                    limit.reschedule(asyncio.get_running_loop().time())

    def _discard_worker(self, error: BaseException) -> None:
        self._mark_lost(error)
        if self._worker is not None:
            self.kept_log = self._worker.keep_log()
            self._worker.kill()
            self._worker = None


def _end(pause: asyncio.Future[None] | None) -> None:
    if pause is not None and not pause.done():
        pause.set_result(None)


def is_fatal(error: BaseException) -> bool:
    """Whether a new worker would fail in the same way, so that the run should end with this error."""
    if isinstance(error, SyncError | ConfigError):
        return True
    return not isinstance(error, RuntimeError | MemoryError | OSError)


async def none_if_lost(answer: Awaitable[T]) -> T | None:
    """None from a lost worker. Its replacement installs the newest snapshot before it does anything else."""
    try:
        return await answer
    except WorkerLost:
        return None
