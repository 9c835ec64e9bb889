"""AsyncRollouts: many workers generate while the learner learns.

One thread runs an event loop with `concurrency` coroutines for each worker. Each of them, over and over,
    waits for the buffer to grant a slot        (unblocked by `publish` and by a group that is dropped)
    lets its worker run the group               (the other coroutines keep the worker's engine busy meanwhile)
    puts the group, or gives the slot back      (unblocks `next_batch`, or another coroutine)
`next_batch`, `publish` and `evaluate` are called by the loop's thread and wait for the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from actors.assemble import PromptCursor, SignalFilter, make_batch, summarize_evaluation, sync_metrics
from actors.buffer import Buffer
from tora.config import RunConfig
from tora.types import EvalResult, Group, Metrics, Prompt, ScoreRequest, SyncReport, TrainBatch

T = TypeVar("T")


class WorkerHandle(Protocol):
    """A `RolloutWorker` elsewhere. Snapshots may be references that only the far side opens."""

    async def run_group(self, prompt: Prompt) -> Group: ...

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[Group]: ...

    async def score(self, requests: Sequence[ScoreRequest], adapter: bool) -> list[np.ndarray]: ...

    async def load_snapshot(self, snapshot: Any) -> SyncReport: ...

    def close(self) -> None: ...


class AsyncRollouts:
    def __init__(
        self,
        cfg: RunConfig,
        workers: Sequence[WorkerHandle],
        prompt_at: Callable[[int], Prompt],
        eval_prompts: Sequence[Prompt],
        state: dict[str, Any],
        *,
        version: int,
    ) -> None:
        """`version`: the policy version that the run starts from. Nothing is generated before the first `publish`."""
        self._cfg, self._workers, self._eval_prompts = cfg, list(workers), eval_prompts
        self._cursor = PromptCursor(prompt_at, state)
        self._filter = SignalFilter(int(cfg.rollout.max_refills * cfg.batch_size))
        self._buffer = Buffer(cfg.batch_size, cfg.max_staleness, version=version)
        self._changed = asyncio.Condition()
        self._failure: BaseException | None = None
        self._slots: list[asyncio.Task[None]] = []
        self._last_batch = time.perf_counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _slot(self, worker: WorkerHandle) -> None:
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(self._buffer.may_grant)
                    slot = self._buffer.grant(self._cursor.next())
                group = await worker.run_group(slot.prompt)
                async with self._changed:
                    if self._filter.keeps(group):
                        self._buffer.put(slot, group)
                    else:
                        self._buffer.give_back(slot)
                    self._changed.notify_all()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # told to the loop's thread, which is the one that can end the run
            async with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def next_batch(self, step: int) -> TrainBatch:
        return self._wait(self._next_batch(step))

    async def _next_batch(self, step: int) -> TrainBatch:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or self._buffer.can_take(step))
            if self._failure is not None:
                raise self._failure
            groups = self._buffer.take(step)
            generated, drops = self._filter.take()
            self._changed.notify_all()
        now = time.perf_counter()
        batch = make_batch(self._cfg, groups, generated, drops, step, now - self._last_batch)
        self._last_batch = now
        batch.metrics["rollout/ready"] = float(self._buffer.num_ready)
        batch.metrics["rollout/in_flight"] = float(self._buffer.num_in_flight)
        return batch

    def publish(self, snapshot: Any) -> Metrics:
        return self._wait(self._publish(snapshot))

    async def _publish(self, snapshot: Any) -> Metrics:
        start = time.perf_counter()
        reports = await asyncio.gather(*(worker.load_snapshot(snapshot) for worker in self._workers))
        async with self._changed:
            self._buffer.advance(reports[0].version)
            self._changed.notify_all()
        if not self._slots:
            self._last_batch = time.perf_counter()
            self._slots = [
                asyncio.create_task(self._slot(worker))
                for _ in range(self._cfg.rollout.concurrency)
                for worker in self._workers
            ]
        return sync_metrics(reports, time.perf_counter() - start)

    def evaluate(self) -> EvalResult:
        return self._wait(self._evaluate())

    async def _evaluate(self) -> EvalResult:
        count = len(self._workers)
        shares = [self._eval_prompts[i::count] for i in range(count)]
        groups = await asyncio.gather(*(w.evaluate(share) for w, share in zip(self._workers, shares, strict=True)))
        return summarize_evaluation([group for share in groups for group in share])

    def score(self, requests: Sequence[ScoreRequest], *, adapter: bool) -> list[list[np.ndarray]]:
        return self._wait(self._score(requests, adapter))

    async def _score(self, requests: Sequence[ScoreRequest], adapter: bool) -> list[list[np.ndarray]]:
        return await asyncio.gather(*(worker.score(requests, adapter) for worker in self._workers))

    def state(self) -> dict[str, Any]:
        return self._wait(self._state())

    async def _state(self) -> dict[str, Any]:
        return self._cursor.state(self._buffer.pending())

    def close(self) -> None:
        """Stops every coroutine, then the workers."""
        self._wait(self._cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for worker in self._workers:
            worker.close()

    async def _cancel(self) -> None:
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
