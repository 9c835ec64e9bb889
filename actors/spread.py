"""The newest snapshot on its way to the workers, which install it one by one while training goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from actors.rollout_metrics import sync_metrics
from actors.seat import Seat
from tora.errors import WorkerLost
from tora.types import Metrics

_LOOK_AGAIN_S = 0.2


class Spread:
    """All calls come from the pool's event loop."""

    def __init__(
        self,
        seats: Sequence[Seat],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_installed: Callable[[], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """`seats`: the pool's list, which grows. `on_installed`: called when a seat has a snapshot, or is lost. `fail`:
        called with an error that ends the run."""
        self._seats, self._spawn, self._on_installed, self._fail = seats, spawn, on_installed, fail
        self._published = asyncio.Event()
        self.snapshot: Any = None
        """The newest."""
        self._began = 0.0
        self._metrics: Metrics = {}
        self._is_measured = False
        self._looks_at = 0

    async def latest(self, lost: Any) -> Any:
        """The newest snapshot, as soon as there is one other than `lost`."""
        await self._published.wait()
        while self.snapshot is None or self.snapshot is lost:
            await asyncio.sleep(_LOOK_AGAIN_S)
        return self.snapshot

    def forget(self) -> None:
        """No worker loads a snapshot before the next one."""
        self.snapshot = None

    def begin(self, snapshot: Any) -> None:
        """Seats that are up install it, after the one that they are installing. Others do before they come up."""
        self.snapshot, self._began, self._is_measured = snapshot, time.perf_counter(), False
        self._published.set()
        for seat in self._seats:
            if seat.up:
                self._spawn(self._install(seat))

    async def _install(self, seat: Seat) -> None:
        try:
            await seat.catch_up()
        except WorkerLost:
            pass  # its replacement installs the newest snapshot before it does anything else
        except Exception as error:
            self._fail(error)
        self.metrics()
        self._on_installed()

    def metrics(self) -> Metrics:
        """Of the last snapshot that reached every seat that was up; empty before the first."""
        if self.is_done and not self._is_measured:
            reports = [seat.report for seat in self._seats if seat.up and seat.report is not None]
            self._metrics, self._is_measured = sync_metrics(reports, time.perf_counter() - self._began), True
        return self._metrics

    @property
    def is_done(self) -> bool:
        """Whether every seat that is up has the newest."""
        for _ in self._seats:  # on from the one that was behind when it was last asked
            seat = self._seats[self._looks_at % len(self._seats)]
            if seat.up and seat.installed is not self.snapshot:
                return False
            self._looks_at += 1
        return True
