"""AsyncRollouts: many workers generate while the learner learns, and workers may die meanwhile.

One thread runs an event loop. Whenever a slot or a worker comes free, the pool hands out work: a slot that the buffer
grants goes to the worker that is up, has room, and owes the fewest tokens. The group goes to the buffer.
    A worker that is lost leaves its slots behind; they go to the next worker that has room, before any new one. A slot
    ends with one group, put once, so none is lost and none is trained twice. Prompts are seeded by their id: under the
    same policy version the group is drawn again from the same seed; under a newer one it is that one's group, and no
    staler than its slot allows.
    `publish` sends the snapshot to the workers that are up. One that starts loads the newest before it gets a group.
`next_batch`, `publish` and `evaluate` are called by the training loop's thread and wait for the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import wait as wait_for_futures
from typing import Any, TypeVar

import numpy as np

from actors.buffer import Buffer, Slot, in_time
from actors.group_filter import SignalFilter
from actors.prompt_cursor import PromptCursor
from actors.rollout_metrics import summarize_evaluation, sync_metrics
from actors.seat import Seat, SeatTiming, WorkerHandle, is_fatal
from tora.batching.train_batch import make_batch
from tora.config.schema import RunConfig
from tora.errors import RolloutError, WorkerLost
from tora.types import EvalResult, Group, LogprobRequest, Metrics, Prompt, RolloutState, TrainBatch

T = TypeVar("T")
_STOP_POLL_S = 0.2
_log = logging.getLogger(__name__)


class AsyncRollouts:
    def __init__(
        self,
        cfg: RunConfig,
        make_worker: Callable[[], WorkerHandle],
        prompt_at: Callable[[int], Prompt],
        eval_prompts: Sequence[Prompt],
        state: RolloutState,
        *,
        version: int,
        timing: SeatTiming | None = None,
    ) -> None:
        """Workers start at once; nothing is generated before the first `publish`, which waits for `num_workers`.

        `make_worker` is called for every worker, also for those that follow on a lost one. `version`: the policy
        version that the run starts from.
        """
        self._cfg, self._make_worker, self._eval_prompts, self._prompt_at = cfg, make_worker, eval_prompts, prompt_at
        self._timing = timing or SeatTiming()
        self._stand_at(state, version)
        self._snapshot: Any = None
        self._published = asyncio.Event()
        self._running = False
        """Since the first publish."""
        self._stopping = False
        self._news = asyncio.Event()
        self._failure: BaseException | None = None
        self._losses = self._losses_in_a_row = self._reruns = 0
        self._tokens = _RunningMean(cfg.grpo_samples * cfg.max_generated_tokens)
        self._tasks: set[asyncio.Task[None]] = set()
        self._seats: list[Seat] = []
        self._last_batch = time.perf_counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        for _ in range(cfg.rollout.max_workers or cfg.rollout.num_workers):
            self._wait(self._add_seat())

    def _stand_at(self, state: RolloutState, version: int) -> None:
        """Nothing is handed out from here until the next publish."""
        per_step, bound = self._cfg.batch_size, self._cfg.max_staleness
        good, late = in_time(state.finished, per_step, bound, version)
        pending = [*state.pending, *(group.prompt.id for _, group in late)]
        self._cursor = PromptCursor(self._prompt_at, RolloutState(state.cursor, pending))
        self._filter = SignalFilter(self._cfg)
        self._buffer = Buffer(per_step, bound, version=version, finished=good)
        self._again: deque[Slot] = deque()
        self._held = True

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _add_seat(self) -> None:
        seat = Seat(len(self._seats), self._make_worker, self._newest, self._cfg.rollout, self, self._timing)
        self._seats.append(seat)
        self._spawn(seat.run_forever())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _newest(self) -> Any:
        await self._published.wait()
        return self._snapshot

    # What seats tell.

    def joined(self, seat: Seat) -> None:
        if self._running:
            _log.warning("rollout worker %d is up", seat.number)
        self._hand_out()
        self._news.set()

    def has_capacity(self) -> None:
        self._hand_out()

    def left(self, seat: Seat, error: BaseException) -> None:
        if is_fatal(error) or not (self._running or seat.number >= self._cfg.rollout.num_workers):
            self._fail(error)  # a worker that does not even start would not start the next time
            return
        self._losses += 1
        self._losses_in_a_row += 1
        ids = sorted(slot.prompt.id for slot in seat.slots)
        again = f"; its prompts run again: {', '.join(map(str, ids))}" if ids else ""
        _log.warning("rollout worker %d is lost (%s)%s", seat.number, error, again)
        if self._losses_in_a_row > self._cfg.rollout.max_restarts:
            lost = f"{self._losses_in_a_row} rollout workers were lost in a row and no group was finished between them"
            self._fail(RolloutError(f"{lost}; the last because: {error}"))

    def _fail(self, error: BaseException) -> None:
        """Told to the training loop's thread, which is the one that can end the run."""
        self._failure = self._failure or error
        self._news.set()

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Errors: what made the run fail."""
        while self._failure is None and not holds():
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure

    # Groups.

    def _hand_out(self) -> None:
        while not self._held and (seat := self._idlest()) is not None:
            if self._again:
                slot = self._again.popleft()
            elif self._buffer.may_grant():
                try:
                    slot = self._buffer.grant(self._cursor.next())
                except Exception as error:  # a dataset's row may be anything
                    self._fail(error)
                    return
            else:
                return
            tokens = len(slot.prompt.token_ids) + self._tokens.mean
            seat.take(slot, tokens)
            self._spawn(self._run(slot, seat, tokens, self._buffer))

    def _idlest(self) -> Seat | None:
        free = (seat for seat in self._seats if seat.up and len(seat.slots) < seat.limit)
        return min(free, key=lambda seat: seat.outstanding, default=None)

    async def _run(self, slot: Slot, seat: Seat, tokens: float, buffer: Buffer) -> None:
        """`buffer` granted the slot."""
        try:
            group = (await seat.run_group(slot, tokens)).with_prompt(slot.prompt)
            self._losses_in_a_row = 0
            self._tokens.add(group.num_tokens)
            if buffer is self._buffer:  # else the run went back meanwhile, and this group belongs to no history
                self._put(slot, group)
        except WorkerLost:
            if buffer is self._buffer:
                self._reruns += 1
                self._again.append(slot)
        except Exception as error:
            self._fail(error)
        self._hand_out()
        self._news.set()

    def _put(self, slot: Slot, group: Group) -> None:
        if self._filter.keeps(group):
            self._buffer.put(slot, group)
        else:
            self._buffer.give_back(slot)

    def next_batch(self, step: int, stop_requested: Callable[[], bool]) -> TrainBatch | None:
        batch = asyncio.run_coroutine_threadsafe(self._next_batch(step), self._loop)
        while not wait_for_futures([batch], timeout=_STOP_POLL_S).done:
            if stop_requested():
                self._loop.call_soon_threadsafe(self._stop_waiting)
        return batch.result()

    def _stop_waiting(self) -> None:
        self._stopping = True
        self._news.set()

    async def _next_batch(self, step: int) -> TrainBatch | None:
        await self._until(lambda: self._stopping or self._buffer.can_take(step))
        if not self._buffer.can_take(step):
            return None
        groups = self._buffer.take(step)
        generated, drops = self._filter.take()
        self._hand_out()
        now = time.perf_counter()
        batch = make_batch(self._cfg, groups, generated, drops, step, now - self._last_batch)
        self._last_batch = now
        batch.metrics["rollout/ready"] = float(self._buffer.num_ready)
        batch.metrics["rollout/in_flight"] = float(self._buffer.num_in_flight)
        batch.metrics["rollout/workers"] = float(len(self._up()))
        batch.metrics["rollout/workers_lost"] = float(self._losses)
        batch.metrics["rollout/groups_rerun"] = float(self._reruns)
        return batch

    def _up(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.up]

    # Snapshots and evaluation.

    def publish(self, snapshot: Any) -> Metrics:
        return self._wait(self._publish(snapshot))

    async def _publish(self, snapshot: Any) -> Metrics:
        start = time.perf_counter()
        self._snapshot = snapshot
        if self._running:
            reports = await asyncio.gather(*(self._unless_lost(seat.forward(snapshot)) for seat in self._up()))
        else:
            self._published.set()
            first = self._seats[: self._cfg.rollout.num_workers]
            await self._until(lambda: all(seat.up for seat in first))
            reports = [seat.report for seat in first]
            self._running, self._last_batch = True, time.perf_counter()
        self._buffer.advance(snapshot.version)
        self._held = False
        self._hand_out()
        return sync_metrics([report for report in reports if report is not None], time.perf_counter() - start)

    @staticmethod
    async def _unless_lost(answer: Awaitable[T]) -> T | None:
        """A lost worker's successor loads the newest snapshot before anything else."""
        try:
            return await answer
        except WorkerLost:
            return None

    def evaluate(self) -> EvalResult:
        return self._wait(self._evaluate())

    async def _evaluate(self) -> EvalResult:
        count = max(1, len(self._up()))
        shares = await asyncio.gather(*(self._evaluate_share(self._eval_prompts[i::count]) for i in range(count)))
        return summarize_evaluation([group for share in shares for group in share])

    async def _evaluate_share(self, prompts: Sequence[Prompt]) -> list[Group]:
        """By whichever worker survives it."""
        while True:
            await self._until(lambda: bool(self._up()))
            seat = min(self._up(), key=lambda seat: (seat.evaluating, seat.outstanding))
            try:
                results = await seat.evaluate(prompts)
            except WorkerLost:
                continue
            return [result.with_prompt(prompt) for result, prompt in zip(results, prompts, strict=True)]

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        return self._wait(self._score(requests, adapter))

    async def _score(self, requests: Sequence[LogprobRequest], adapter: bool) -> dict[int, list[np.ndarray]]:
        seats = self._up()
        answers = await asyncio.gather(*(self._unless_lost(seat.logprobs(requests, adapter)) for seat in seats))
        return {seat.number: answer for seat, answer in zip(seats, answers, strict=True) if answer is not None}

    def state(self) -> RolloutState:
        return self._wait(self._state())

    async def _state(self) -> RolloutState:
        return self._cursor.state(self._buffer.in_flight(), self._buffer.finished())

    def rewind(self, state: RolloutState, version: int) -> None:
        """What workers are running is dropped when it comes back; they stay up."""
        self._wait(self._rewind(state, version))

    async def _rewind(self, state: RolloutState, version: int) -> None:
        self._stand_at(state, version)

    def close(self) -> None:
        """Stops every coroutine, then the workers."""
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(seat.close() for seat in self._seats))


class _RunningMean:
    """Of the last few dozen numbers, starting from a guess."""

    _WEIGHT = 1 / 32

    def __init__(self, guess: float) -> None:
        self.mean = guess

    def add(self, number: float) -> None:
        self.mean += self._WEIGHT * (number - self.mean)
