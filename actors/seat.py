"""Seat: a place for a rollout worker. One that dies, hangs or breaks there is replaced.

    starting    a new worker waits for room in the cluster, then for its engine
    syncing     it loads the newest snapshot, and again if a newer one came out meanwhile
    up          it runs groups; a heartbeat tells that it lives, and how full its engine is
    lost        it is killed; what it was doing fails with `WorkerLost`; after a pause a new one starts

A worker is lost when a call fails with an error that a new process may be free of, when a call takes longer than its
limit, or when the heartbeat stays away. A wrong snapshot (`SyncError`) or a wrong argument would fail again, and is
the run's failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from actors.buffer import Slot
from actors.concurrency import adapted
from tora.config.schema import RolloutConfig
from tora.errors import ConfigError, SyncError, WorkerLost
from tora.types import GroupResult, LogprobRequest, Occupancy, Prompt, SyncReport

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatTiming:
    """All in seconds."""

    heartbeat_every_s: float = 2.0
    """Between two heartbeats."""
    first_delay_s: float = 1.0
    """Before a lost worker is replaced; doubles with each worker that is lost without finishing a group."""
    max_delay_s: float = 60.0

    def restart_delay_s(self, failures: int) -> float:
        """Before the next worker starts, after `failures` in a row that finished no group."""
        return min(self.max_delay_s, self.first_delay_s * 2.0 ** min(failures, 32))


class WorkerHandle(Protocol):
    """A `RolloutWorker` elsewhere. Snapshots may be references that only the far side opens.

    `start` comes first; after `kill` comes nothing.
    """

    async def start(self, limit_s: float) -> None: ...

    async def run_group(self, prompt: Prompt) -> GroupResult: ...

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[GroupResult]: ...

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]: ...

    async def forward(self, snapshot: Any) -> SyncReport: ...

    async def occupancy(self) -> Occupancy: ...

    async def close(self) -> None: ...

    def kill(self) -> None: ...


class SeatEvents(Protocol):
    """What a seat tells the pool, on the event loop."""

    def joined(self, seat: Seat) -> None:
        """It is up."""

    def left(self, seat: Seat, error: BaseException) -> None:
        """Its worker failed; unless `is_fatal`, another one follows."""

    def has_capacity(self) -> None:
        """A seat may take more groups."""


class Seat:
    def __init__(
        self,
        number: int,
        make_worker: Callable[[], WorkerHandle],
        policy: Callable[[], Coroutine[Any, Any, Any]],
        cfg: RolloutConfig,
        events: SeatEvents,
        timing: SeatTiming,
    ) -> None:
        """`policy` answers the newest snapshot, once there is one."""
        self.number, self._make, self._policy, self._cfg, self._events = number, make_worker, policy, cfg, events
        self._timing = timing
        self.up = False
        self.report: SyncReport | None = None
        self.limit = cfg.concurrency
        self.slots: set[Slot] = set()
        """Groups in flight here."""
        self.outstanding = 0.0
        """Tokens that they will make, as far as one can tell."""
        self.evaluating = 0
        """Evaluations in flight here."""
        self._failures = 0
        self._worker: WorkerHandle | None = None
        self._end: asyncio.Future[BaseException] | None = None

    async def run_forever(self) -> None:
        """For ever: a worker after the other."""
        while True:
            self._end = asyncio.get_running_loop().create_future()
            try:
                self._worker = self._make()
                await self._worker.start(self._cfg.start_timeout_s)
                await self._catch_up()
                self.up = True
                self._events.joined(self)
                await self._watch()
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # the pool decides what it means
                self._discard_worker(error)
                self._events.left(self, error)
            await asyncio.sleep(self._timing.restart_delay_s(self._failures))
            self._failures += 1

    def take(self, slot: Slot, tokens: float) -> None:
        """A promise to `run_group` it. `tokens`: how many the group is likely to make."""
        self.slots.add(slot)
        self.outstanding += tokens

    async def run_group(self, slot: Slot, tokens: float) -> GroupResult:
        """After `take`. Errors: as of `_call`."""
        try:
            result = await self._call(lambda worker: worker.run_group(slot.prompt), self._cfg.group_timeout_s)
        finally:
            self.slots.remove(slot)
            self.outstanding -= tokens
        self._failures = 0
        return result

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[GroupResult]:
        """Errors: as of `_call`."""
        rounds = -(-len(prompts) // self._cfg.concurrency)
        limit_s = self._cfg.group_timeout_s * max(1, rounds)
        self.evaluating += 1
        try:
            return await self._call(lambda worker: worker.evaluate(prompts), limit_s)
        finally:
            self.evaluating -= 1

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]:
        """Errors: as of `_call`."""
        return await self._call(lambda worker: worker.logprobs(requests, adapter), self._cfg.group_timeout_s)

    async def forward(self, snapshot: Any) -> SyncReport:
        """Errors: as of `_call`."""
        self.report = await self._call(lambda worker: worker.forward(snapshot), self._cfg.group_timeout_s)
        return self.report

    async def close(self) -> None:
        """After `run_forever` was cancelled: ends the worker, gently if it can answer."""
        if self._worker is None:
            return
        if self.up:
            await self._worker.close()
        else:
            self._worker.kill()

    async def _catch_up(self) -> None:
        loaded = None
        while loaded is not (newest := await self._policy()):
            await self.forward(newest)
            loaded = newest

    async def _watch(self) -> None:
        """Until the worker is lost. Errors: as of `_call`."""
        assert self._end is not None
        while True:
            await asyncio.wait({self._end}, timeout=self._timing.heartbeat_every_s)
            load = await self._call(lambda worker: worker.occupancy(), self._cfg.heartbeat_s)
            before, self.limit = self.limit, adapted(self.limit, self._cfg.concurrency, len(self.slots), load)
            if self.limit > before:
                self._events.has_capacity()

    async def _call(self, ask: Callable[[WorkerHandle], Awaitable[T]], limit_s: float) -> T:
        """The worker's answer. Errors: WorkerLost where there will be none; fatal ones as themselves."""
        worker, end = self._worker, self._end
        if worker is None or end is None or end.done():
            raise WorkerLost(str(end.result()) if end and end.done() else "it has not started")
        call = asyncio.ensure_future(ask(worker))
        try:
            await asyncio.wait({call, end}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not call.done():
                call.cancel()
        if not call.done():
            error: BaseException | None = WorkerLost(f"it did not answer within {limit_s:g} s")
        elif (error := call.exception()) is None:
            return call.result()
        if is_fatal(error):
            raise error
        self._lose(error)
        raise WorkerLost(str(end.result())) from end.result()

    def _lose(self, error: BaseException) -> None:
        """Wakes all who wait for this worker, and keeps everybody else away from it."""
        self.up = False
        if self._end is not None and not self._end.done():
            self._end.set_result(error)

    def _discard_worker(self, error: BaseException) -> None:
        self._lose(error)
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def is_fatal(error: BaseException) -> bool:
    """Whether a new worker would fail in the same way, so that the run had better end with the error itself."""
    if isinstance(error, SyncError | ConfigError):
        return True
    return not isinstance(error, RuntimeError | MemoryError | OSError)
