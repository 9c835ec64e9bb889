"""AsyncRollouts: many workers generate while the learner trains, and any of them may die.

    learner's thread        event loop (one thread)                                          workers

    next_batch ....> _next_batch ....> Buffer.can_take
                                            ^
                                            | put
                                       _run_slot (one per group) ....> Seat.run_group .....> run_group
                                            ^
                                            | starts
                                       _dispatch <--- a step's groups are taken, a group ends, a snapshot
                                                      is published, a seat comes up or its limit rises
    publish .......> _publish ....> Seat.forward (each seat that is up) ...................> forward
                        |
                        +--> Buffer.advance, which frees slots
    evaluate ......> _evaluate_share ....> Seat.evaluate ..................................> evaluate
                     Seat.run_forever (one per seat) ......................................> start, forward, occupancy

    A ....> B   A waits for B        A --> B   A unblocks B

Nobody waits for a lost worker: its calls fail at once with `WorkerLost`, and every call has a time limit. The first
`publish` waits until `num_workers` seats are up, and these in turn wait for its snapshot. `next_batch` also returns
when a stop is requested, and `publish`, `evaluate` and `logprobs` with what they have by then. Waiting for groups or
for a seat to come up ends when the run fails.

Dispatch gives a slot from the buffer to the seat that is up, has room and has the fewest tokens outstanding. The slots
of a lost worker go to the next seat with room, before any new slot. A slot ends with one group, put once, so no group
is lost or trained twice. Requests are seeded by prompt id: under the same policy version a rerun uses the same seed.
Under a newer version the group belongs to that version, which is no staler than the slot allows.

All state belongs to the event loop's thread. The public methods are called from the learner's thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from actors.buffer import Buffer, Slot, spare_slots, split_by_deadline
from actors.group_filter import SignalFilter, show_printed
from actors.prompt_cursor import PromptCursor
from actors.rollout_metrics import sync_metrics
from actors.running_mean import RunningMean
from actors.seat import Seat, SeatTiming, WorkerHandle, is_fatal
from tora.batching.train_batch import make_batch
from tora.config.schema import RunConfig
from tora.errors import RolloutError, WorkerLost, described
from tora.types import Group, LogprobRequest, Metrics, Prompt, RolloutState, TrainBatch

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
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Starts the workers. Nothing is generated before the first `publish`.

        `make_worker` is called for every worker, including each replacement. `prompt_at` is the prompt stream. The run
        starts from `state` at policy version `version`. `stop_requested` ends every wait.
        """
        self._cfg, self._make_worker, self._eval_prompts, self._prompt_at = cfg, make_worker, eval_prompts, prompt_at
        self._timing, self._stop_requested = timing or SeatTiming(), stop_requested
        self._reset(state, version)
        self._snapshot: Any = None
        self._published = asyncio.Event()
        self._started = False
        """Whether the first publish is done."""
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._losses = self._reruns = self._aborted = 0
        self._running: dict[Slot, asyncio.Task[None]] = {}
        self._tokens_per_group = RunningMean(cfg.grpo_samples * cfg.max_generated_tokens)
        self._tasks: set[asyncio.Task[None]] = set()
        self._seats: list[Seat] = []
        self._last_batch = time.perf_counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        for _ in range(cfg.rollout.max_workers or cfg.rollout.num_workers):
            self._run_on_loop(self._add_seat())

    def _reset(self, state: RolloutState, version: int) -> None:
        """Nothing is dispatched until the next publish."""
        per_step, bound = self._cfg.batch_size, self._cfg.max_staleness
        usable, late = split_by_deadline(state.finished, per_step, bound, version)
        pending = [*state.pending, *(group.prompt.id for _, group in late)]
        self._cursor = PromptCursor(self._prompt_at, RolloutState(state.cursor, pending))
        self._filter = SignalFilter(self._cfg)
        self._buffer = Buffer(per_step, bound, version=version, finished=usable, spare=spare_slots(self._cfg))
        self._retries: deque[Slot] = deque()
        self._paused = True

    def _run_on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _wait_for(self, coroutine: Coroutine[Any, Any, T], stop_requested: Callable[[], bool]) -> T:
        """The coroutine's result. It learns of a requested stop through `_stopping`."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        while not wait_for_futures([future], timeout=_STOP_POLL_S).done:
            if stop_requested():
                self._loop.call_soon_threadsafe(self._stop_waiting)
        return future.result()

    def _stop_waiting(self) -> None:
        self._stopping.set()
        self._changed.set()

    async def _all_or_stop(self, calls: Iterable[Coroutine[Any, Any, T]]) -> list[T] | None:
        """All results, or None if a stop is requested first. Raises the first error of a call."""
        together = asyncio.gather(*calls)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({together, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return together.result() if together.done() else None
        finally:
            stopping.cancel()
            if not together.done():
                together.cancel()
                with suppress(asyncio.CancelledError):
                    await together

    async def _add_seat(self) -> None:
        seat = Seat(
            len(self._seats), self._make_worker, self._latest_snapshot, self._cfg.rollout, self, timing=self._timing
        )
        self._seats.append(seat)
        self._spawn(seat.run_forever())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _latest_snapshot(self) -> Any:
        await self._published.wait()
        return self._snapshot

    def _seats_up(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.up]

    # SeatEvents

    def on_worker_up(self, seat: Seat) -> None:
        if self._started:
            _log.warning("rollout worker %d is up", seat.number)
        self._dispatch()
        self._changed.set()

    def on_capacity(self) -> None:
        self._dispatch()

    def on_worker_lost(self, seat: Seat, error: BaseException) -> None:
        is_required = not self._started and seat.number < self._cfg.rollout.num_workers
        reason = f"{error}; {seat.kept_log}" if seat.kept_log else str(error)
        if is_fatal(error) or is_required:  # a worker that cannot start now will not start later either
            self._fail(error if is_fatal(error) or not seat.kept_log else RolloutError(reason))
            return
        self._losses += 1
        ids = sorted(slot.prompt.id for slot in seat.slots)
        reruns = f"; its prompts run again: {', '.join(map(str, ids))}" if ids else ""
        _log.warning("rollout worker %d is lost (%s)%s", seat.number, reason, reruns)
        if seat.losses_in_a_row > self._cfg.rollout.max_restarts and not self._seats_up():
            lost = f"{seat.losses_in_a_row} rollout workers were lost in a row without finishing a group"
            self._fail(RolloutError(f"{lost}; the last error: {reason}"))

    def _fail(self, error: BaseException) -> None:
        """The learner's thread raises the error from the call it is waiting in, or from its next one."""
        self._failure = self._failure or error
        self._changed.set()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Raises the run's failure if there is one."""
        while self._failure is None and not condition():
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    # Groups

    def _dispatch(self) -> None:
        """Start groups until slots or seats run out."""
        while not self._paused and (seat := self._least_loaded()) is not None:
            if self._retries:
                slot = self._retries.popleft()
            elif self._buffer.may_grant():
                try:
                    slot = self._buffer.grant(self._cursor.next())
                except Exception as error:  # a dataset's row may be anything
                    self._fail(error)
                    return
            else:
                return
            tokens = len(slot.prompt.token_ids) + self._tokens_per_group.mean
            seat.reserve(slot, tokens)
            task = self._spawn(self._run_slot(slot, seat, tokens, self._buffer))
            task.add_done_callback(partial(self._on_slot_ended, slot, seat, tokens))
            self._running[slot] = task

    def _least_loaded(self) -> Seat | None:
        free = (seat for seat in self._seats if seat.up and len(seat.slots) < seat.limit)
        return min(free, key=lambda seat: seat.outstanding_tokens, default=None)

    async def _run_slot(self, slot: Slot, seat: Seat, tokens: float, buffer: Buffer) -> None:
        """`buffer` granted the slot. After a rewind it is no longer the pool's, and the group is discarded."""
        try:
            group = (await seat.run_group(slot, tokens)).with_prompt(slot.prompt)
            self._tokens_per_group.add(group.num_tokens)
            if buffer is self._buffer:
                self._keep_or_drop(slot, group)
        except WorkerLost:
            if buffer is self._buffer:
                self._reruns += 1
                self._retries.append(slot)
        except Exception as error:
            self._fail(error)

    def _on_slot_ended(self, slot: Slot, seat: Seat, tokens: float, task: asyncio.Task[None]) -> None:
        """Also of a task that was aborted, perhaps before it began."""
        seat.release(slot, tokens)
        if self._running.get(slot) is task:
            del self._running[slot]
        self._dispatch()
        self._changed.set()

    def _abort(self, slots: Iterable[Slot]) -> None:
        """End the work on groups that nobody needs any more."""
        for slot in slots:
            if slot in self._retries:
                self._retries.remove(slot)
            if (task := self._running.get(slot)) is not None:
                task.cancel()
            self._aborted += 1

    def _keep_or_drop(self, slot: Slot, group: Group) -> None:
        if self._filter.admit(group):
            self._buffer.put(slot, group)
        else:
            self._buffer.release(slot)

    def next_batch(self, step: int, stop_requested: Callable[[], bool]) -> TrainBatch | None:
        return self._wait_for(self._next_batch(step), stop_requested)

    async def _next_batch(self, step: int) -> TrainBatch | None:
        await self._wait_until(lambda: self._stopping.is_set() or self._buffer.can_take(step))
        if not self._buffer.can_take(step):
            return None
        groups = self._buffer.take(step)
        late, finished = self._buffer.expire(step)
        self._abort(late)
        self._cursor.put_back(slot.prompt.id for slot in (*late, *finished))
        generated, drops = self._filter.drain()
        self._dispatch()
        now = time.perf_counter()
        batch = make_batch(self._cfg, groups, generated, drops, step, now - self._last_batch)
        self._last_batch = now
        batch.metrics["rollout/ready"] = float(self._buffer.num_ready)
        batch.metrics["rollout/prompts_dropped"] = float(self._cursor.take_dropped())
        batch.metrics["rollout/in_flight"] = float(self._buffer.num_in_flight)
        batch.metrics["rollout/workers"] = float(len(self._seats_up()))
        batch.metrics["rollout/workers_lost"] = float(self._losses)
        batch.metrics["rollout/groups_rerun"] = float(self._reruns)
        batch.metrics["rollout/groups_aborted"] = float(self._aborted)
        return batch

    # Snapshots, evaluation, log-probs

    def publish(self, snapshot: Any, *, generates: bool = True) -> Metrics:
        return self._wait_for(self._publish(snapshot, generates), self._stop_requested)

    async def _publish(self, snapshot: Any, generates: bool) -> Metrics:
        start = time.perf_counter()
        self._snapshot = snapshot
        if self._started:
            calls = [_none_if_lost(seat.forward(snapshot)) for seat in self._seats_up()]
            reports = await self._all_or_stop(calls) or []
        else:
            self._published.set()
            required = self._seats[: self._cfg.rollout.num_workers]
            await self._wait_until(lambda: self._stopping.is_set() or all(seat.up for seat in required))
            reports = [seat.report for seat in required if seat.up]
            self._started, self._last_batch = True, time.perf_counter()
        if generates:
            self._buffer.advance(snapshot.version)
            self._paused = False
            self._dispatch()
        return sync_metrics([report for report in reports if report is not None], time.perf_counter() - start)

    def evaluate(self) -> list[Group] | None:
        return self._wait_for(self._evaluate(), self._stop_requested)

    async def _evaluate(self) -> list[Group] | None:
        count = max(1, len(self._seats_up()))
        shares = await self._all_or_stop(self._evaluate_share(self._eval_prompts[i::count]) for i in range(count))
        if shares is None:
            return None
        by_id = {group.prompt.id: group for share in shares for group in share}
        return [by_id[prompt.id] for prompt in self._eval_prompts]

    async def _evaluate_share(self, prompts: Sequence[Prompt]) -> list[Group]:
        """On another worker if the first is lost."""
        while True:
            await self._wait_until(lambda: bool(self._seats_up()))
            seat = min(self._seats_up(), key=lambda seat: (seat.num_evaluations, seat.outstanding_tokens))
            try:
                results = await seat.evaluate(prompts)
            except WorkerLost:
                continue
            groups = [result.with_prompt(prompt) for result, prompt in zip(results, prompts, strict=True)]
            show_printed(groups)
            return groups

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        return self._wait_for(self._logprobs(requests, adapter), self._stop_requested)

    async def _logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> dict[int, list[np.ndarray]]:
        seats = self._seats_up()
        answers = await self._all_or_stop(_none_if_lost(seat.logprobs(requests, adapter)) for seat in seats)
        if answers is None:
            return {}
        return {seat.number: answer for seat, answer in zip(seats, answers, strict=True) if answer is not None}

    # State

    def state(self) -> RolloutState:
        return self._run_on_loop(self._state())

    async def _state(self) -> RolloutState:
        return self._cursor.state(self._buffer.in_flight(), self._buffer.finished())

    def rewind(self, state: RolloutState, version: int) -> None:
        """Workers stay up; the groups that they are running are aborted."""
        self._run_on_loop(self._rewind(state, version))

    async def _rewind(self, state: RolloutState, version: int) -> None:
        self._abort(list(self._running))
        self._reset(state, version)

    def close(self) -> None:
        """Stops every coroutine, then the workers."""
        self._run_on_loop(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._paused = True
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        endings = await asyncio.gather(*(seat.close() for seat in self._seats), return_exceptions=True)
        for seat, ending in zip(self._seats, endings, strict=True):
            if isinstance(ending, BaseException):  # the run is over: its result does not depend on this
                _log.warning("rollout worker %d did not close: %s", seat.number, described(ending))


async def _none_if_lost(answer: Awaitable[T]) -> T | None:
    """None from a lost worker. Its replacement installs the newest snapshot before it does anything else."""
    try:
        return await answer
    except WorkerLost:
        return None
