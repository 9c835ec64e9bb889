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
    evaluated .....> _evaluated ....> Evaluation.is_done
                                            ^
                                            | put
                                       _run_evaluation (one per call) ....> Seat.evaluate ..> evaluate
                     Seat.run_forever (one per seat) ......................................> start, forward, occupancy

    A ....> B   A waits for B        A --> B   A unblocks B

Nobody waits for a lost worker: its calls fail at once with `WorkerLost`, and every call has a time limit. The first
`publish` waits until `num_workers` seats are up, and these in turn wait for its snapshot. `next_batch` also returns
when a stop is requested, and `publish`, `evaluated` and `logprobs` with what they have by then. Waiting for groups or
for a seat to come up ends when the run fails.

An evaluation is cut into calls, which take the room that groups leave, but one of each worker at all times. While the
learner waits for it, its calls go first.

Dispatch gives a slot from the buffer to the seat that is up, has room and has the fewest tokens outstanding. The slots
of a lost worker go to the next seat with room, before any new slot. A slot ends with one group, put once, so no group
is lost or trained twice. Requests are seeded by prompt id: under the same policy version a rerun uses the same seed.
Under a newer version the group belongs to that version, which is no staler than the slot allows.

All state belongs to the event loop's thread. The public methods are called from the learner's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from actors.buffer import Buffer, Slot, spare_slots, split_by_deadline
from actors.evaluation import Evaluation, Evaluator, prompts_per_call
from actors.group_filter import SignalFilter, show_printed
from actors.loop_thread import LoopThread
from actors.prompt_cursor import PromptCursor
from actors.rollout_metrics import sync_metrics
from actors.running_mean import RunningMean
from actors.seat import Seat, SeatTiming, WorkerHandle, is_fatal
from tora.batching.train_batch import make_batch
from tora.config.schema import RunConfig
from tora.errors import LearnerLost, RolloutError, WorkerLost, described
from tora.types import Group, LogprobRequest, Metrics, Prompt, RolloutState, TrainBatch

T = TypeVar("T")
_LOOK_AGAIN_S = 0.2
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
        self._failure: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._seats: list[Seat] = []
        self._evaluator = Evaluator(self._seats, self._spawn, self._on_evaluation_call_ended, self._fail)
        self._reset(state, version)
        self._published, self._stopping, self._changed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._started = False
        """Whether the first publish is done."""
        self._losses = self._reruns = self._aborted = 0
        self._running: dict[Slot, asyncio.Task[None]] = {}
        self._tokens_per_group = RunningMean(cfg.grpo_samples * cfg.max_generated_tokens)
        self._last_batch = time.perf_counter()
        self._loop = LoopThread("rollouts")
        for _ in range(cfg.rollout.max_workers or cfg.rollout.num_workers):
            self._loop.run(self._add_seat())

    def _reset(self, state: RolloutState, version: int) -> None:
        """Nothing is dispatched until the next publish."""
        per_step, bound = self._cfg.batch_size, self._cfg.max_staleness
        usable, late = split_by_deadline(state.finished, per_step, bound, version)
        pending = [*state.pending, *(group.prompt.id for _, group in late)]
        self._cursor = PromptCursor(self._prompt_at, RolloutState(state.cursor, pending))
        self._filter = SignalFilter(self._cfg)
        self._buffer = Buffer(per_step, bound, version=version, finished=usable, spare=spare_slots(self._cfg))
        self._retries: deque[Slot] = deque()
        self._evaluator.give_up()
        self._failure = None if isinstance(self._failure, LearnerLost) else self._failure
        self._snapshot: Any = None  # a worker that starts now would load that of another history
        self._paused = True

    def _wait_for(self, coroutine: Coroutine[Any, Any, T], stop_requested: Callable[[], bool]) -> T:
        """The coroutine's result. It learns of a requested stop through `_stopping`."""
        return self._loop.wait_for(coroutine, stop_requested, self._stop_waiting)

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

    async def _latest_snapshot(self, lost: Any) -> Any:
        """The newest one, as soon as there is one other than `lost`."""
        await self._published.wait()
        while self._snapshot is lost:
            await asyncio.sleep(_LOOK_AGAIN_S)
        return self._snapshot

    def _seats_up(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.up]

    # SeatEvents

    def on_worker_up(self, seat: Seat) -> None:
        if self._started:
            _log.warning("rollout worker %d is up", seat.number)
        self._dispatch()
        self._changed.set()

    def on_snapshot_lost(self, snapshot: Any) -> None:
        if snapshot is self._snapshot:  # its owner is gone, and whoever waits for rollouts would not notice
            self._fail(LearnerLost("the learner is lost: the node that held its newest policy is gone"))

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
        """Start groups, and calls of an evaluation, until there are none to start or seats run out."""
        if self._evaluator.goes_first:
            self._evaluator.dispatch()
        if not self._evaluator.goes_first:
            self._dispatch_groups()
            self._evaluator.dispatch()

    def _dispatch_groups(self) -> None:
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

    def start_evaluation(self, *, pinned: bool) -> None:
        self._loop.run(self._start_evaluation(pinned))

    async def _start_evaluation(self, pinned: bool) -> None:
        per_call = prompts_per_call(self._cfg, len(self._eval_prompts), len(self._seats_up()))
        self._evaluator.start(Evaluation(self._eval_prompts, per_call, self._snapshot if pinned else None))
        self._dispatch()

    def _on_evaluation_call_ended(self) -> None:
        self._dispatch()
        self._changed.set()

    def evaluated(self, *, wait: bool) -> list[Group] | None:
        return self._wait_for(self._evaluated(wait), self._stop_requested)

    async def _evaluated(self, wait: bool) -> list[Group] | None:
        if wait:
            self._evaluator.is_awaited = True
            self._dispatch()
            await self._wait_until(lambda: self._stopping.is_set() or self._evaluator.is_done)
        groups = self._evaluator.finished()
        if groups is not None:
            self._dispatch()
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
        return self._loop.run(self._state())

    async def _state(self) -> RolloutState:
        return self._cursor.state(self._buffer.in_flight(), self._buffer.finished())

    def rewind(self, state: RolloutState, version: int) -> None:
        """Workers stay up; the groups that they are running are aborted, and an evaluation is given up."""
        self._loop.run(self._rewind(state, version))

    async def _rewind(self, state: RolloutState, version: int) -> None:
        self._abort(list(self._running))
        self._reset(state, version)

    def close(self) -> None:
        """Stops every coroutine, then the workers."""
        self._loop.run(self._close())
        self._loop.close()

    async def _close(self) -> None:
        self._paused = True
        self._evaluator.give_up()
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
