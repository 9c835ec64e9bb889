"""AsyncRollouts: many workers generate while the learner trains, and any of them may die.

    learner's thread        event loop (one thread)                                          workers

    next_batch ....> _take ..........> Buffer.can_take
                                            ^
                                            | put
                                       _run_slot (one per group) ....> Seat.run_group .....> run_group
                                            ^
                                            | starts
                                       _dispatch <--- a step's groups are taken, a group ends, a snapshot
                                                      is published, a seat comes up or its limit rises
    publish .......> _publish ---> Buffer.advance, which frees slots
                        |
                        +--> Spread (each seat that is up) ....> Seat.catch_up .............> forward
    logprobs ......> _until_spread
    evaluated .....> Evaluator.is_done <--- its calls ....> Seat.evaluate .................> evaluate
                     Seat.run_forever (one per seat) ......................................> start, forward, occupancy

    A ....> B   A waits for B        A --> B   A unblocks B

A snapshot spreads while training goes on: each worker installs it in its own time, and is given groups by the version
that it has. The learner waits for all of them only before the first groups, after a rewind, and for log-probs.

Nobody waits for a lost worker: its calls fail at once with `WorkerLost`, and every call has a time limit. The first
`publish` waits until `min_workers` seats are up, and these in turn wait for its snapshot. `next_batch` also returns
when a stop is requested, and `publish`, `evaluated` and `logprobs` with what they have by then. A wait for groups or a
seat ends when the run fails.

An evaluation is cut into calls, which take workers of their own, or the room that groups leave, but one of each worker
at all times. While the learner waits for it, its calls go first.

Dispatch gives a slot from the buffer to the seat that is up, has room and has the fewest tokens outstanding. The slots
of a lost worker go to the next seat with room, before any new slot. A slot ends with one group, put once, so no group
is lost or trained twice. Requests are seeded by prompt id: under the same policy version a rerun uses the same seed.
Under a newer version the group belongs to that version, which is no staler than the slot allows. All state belongs to
the event loop's thread. The public methods are called from the learner's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from actors.buffer import Buffer, Slot, buffer_of
from actors.evaluation import Evaluation, Evaluator, prompts_per_call
from actors.free_seats import FreeSeats
from actors.group_filter import SignalFilter, show_printed
from actors.loop_thread import LoopThread, all_or_none
from actors.prompt_cursor import PromptCursor
from actors.prompts_ahead import LEAST_AHEAD, PromptSource
from actors.running_mean import RunningMean
from actors.seat import Seat, SeatTiming, WorkerHandle, is_fatal, none_if_lost
from actors.spread import Spread
from tora.batching.train_batch import make_batch, make_part
from tora.config.schema import RunConfig
from tora.errors import LearnerLost, RolloutError, WorkerLost, described
from tora.types import Group, LogprobRequest, Metrics, Prompt, RolloutState, TrainBatch

T = TypeVar("T")
_log = logging.getLogger(__name__)


class AsyncRollouts:
    def __init__(
        self,
        cfg: RunConfig,
        make_worker: Callable[[], WorkerHandle],
        prompts: PromptSource,
        eval_prompts: Sequence[Prompt],
        state: RolloutState,
        *,
        version: int,
        timing: SeatTiming | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        watch: Callable[[], object] = lambda: None,
        make_evaluator: Callable[[], WorkerHandle] | None = None,
    ) -> None:
        """Starts the workers. Nothing is generated before the first `publish`.

        `make_worker` is called for every worker, including each replacement; `make_evaluator` for those of
        `eval.num_workers`. `prompts` is closed with this object. The run starts from `state` at version `version`.
        `stop_requested` ends a wait, and so does an error of `watch`.
        """
        self._cfg, self._eval_prompts, self._stop_requested = cfg, eval_prompts, stop_requested
        self._failure: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._seats: list[Seat] = []
        self._evaluator = Evaluator(self._seats, self._spawn, self._go_on, self._fail)
        self._spread = Spread(self._seats, self._spawn, self._go_on, self._fail)
        self._maker, self._loop = prompts, LoopThread("rollouts", watch)
        self._reset(state, version)
        self._stopping, self._changed = asyncio.Event(), asyncio.Event()
        self._started, self._dispatches = False, False
        """Whether the first publish is done, and whether a dispatch comes soon."""
        self._losses = self._reruns = self._aborted = 0
        self._running: dict[Slot, asyncio.Task[None]] = {}
        self._tokens_per_group = RunningMean(cfg.grpo_samples * cfg.max_generated_tokens)
        self._last_batch = time.perf_counter()
        self._loop.run(self._open(timing or SeatTiming(), make_worker, make_evaluator or make_worker))

    def _reset(self, state: RolloutState, version: int) -> None:
        """Nothing is dispatched until the next publish."""
        self._buffer, late = buffer_of(self._cfg, version, state.finished)
        rest = RolloutState(state.cursor, [*state.pending, *(group.prompt.id for group in late)])
        ahead, on_ready = max(LEAST_AHEAD, self._cfg.batch_size), partial(self._loop.call_soon, self._dispatch_soon)
        self._prompts = PromptCursor(self._maker.ask, rest, ahead=ahead, on_ready=on_ready)
        self._filter = SignalFilter(self._cfg)
        self._retries: deque[Slot] = deque()
        self._evaluator.give_up()
        self._failure = None if isinstance(self._failure, LearnerLost) else self._failure
        self._spread.forget()  # a worker that starts now would load a snapshot of another history
        self._paused = True

    def _wait_for(self, coroutine: Coroutine[Any, Any, T], stop_requested: Callable[[], bool]) -> T:
        """The coroutine's result. It learns of a requested stop through `_stopping`."""
        return self._loop.wait_for(coroutine, stop_requested, self._stop_waiting)

    def _stop_waiting(self) -> None:
        self._stopping.set()
        self._changed.set()

    async def _open(self, timing: SeatTiming, *makers: Callable[[], WorkerHandle]) -> None:
        cfg, of_evaluations = self._cfg.rollout, (self._cfg.eval.num_workers or 0) if self._cfg.eval else 0
        of_groups, own = (partial(Seat, make, self._spread.latest, cfg, timing=timing) for make in makers)
        self._seats += [of_groups(number, events=self) for number in range(cfg.max_workers or cfg.num_workers)]
        for seat in (*self._seats, *self._evaluator.add(of_evaluations, own)):
            self._spawn(seat.run_forever())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _seats_up(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.up]

    # SeatEvents

    def on_worker_up(self, seat: Seat) -> None:
        if self._started:
            _log.warning("rollout worker %d is up", seat.number)
        self._go_on()

    def _go_on(self) -> None:
        """Something happened that somebody may be waiting for."""
        self._dispatch_soon()
        self._changed.set()

    def on_snapshot_lost(self, snapshot: Any) -> None:
        if snapshot is self._spread.snapshot:  # its owner is gone, and whoever waits for rollouts would not notice
            self._fail(LearnerLost("the learner is lost: the node that held its newest policy is gone"))

    def on_capacity(self) -> None:
        self._dispatch_soon()

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
        """Or until a stop is requested. Raises the run's failure if there is one."""
        while self._failure is None and not (self._stopping.is_set() or condition()):
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    # Groups

    def _dispatch_soon(self) -> None:
        """Once for all that happens in one round of the event loop, such as a whole step's groups that end."""
        if not self._dispatches:
            self._dispatches = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Start groups, and calls of an evaluation, until there are none to start or seats run out."""
        self._dispatches = False
        if self._evaluator.goes_first:
            self._evaluator.dispatch()
        if not self._evaluator.goes_first:
            self._dispatch_groups()
            self._evaluator.dispatch()

    def _dispatch_groups(self) -> None:
        if self._paused or not (self._retries or (self._buffer.may_grant() and self._prompts.is_ready())):
            return
        free = FreeSeats(self._seats)
        while self._failure is None and (start := self._next_start(free)) is not None:
            seat, slot = start
            free.remove(seat)
            tokens = len(slot.prompt.token_ids) + self._tokens_per_group.mean
            seat.reserve(slot, tokens)
            free.add(seat)
            task = self._spawn(self._run_slot(slot, seat, tokens, self._buffer))
            task.add_done_callback(partial(self._on_slot_ended, slot, seat, tokens))
            self._running[slot] = task

    def _next_start(self, free: FreeSeats) -> tuple[Seat, Slot] | None:
        """A seat with room and the slot that it gets, which must not be newer than the seat's version."""
        for slot in self._retries:
            if (seat := free.find(lambda version, slot=slot: version >= slot.version)) is not None:
                self._retries.remove(slot)
                return seat, slot
        try:
            if (seat := free.find(self._buffer.may_grant)) is None or (prompt := self._prompts.take()) is None:
                return None
        except Exception as error:  # a dataset's row may be anything
            self._fail(error)
            return None
        return seat, self._buffer.grant(prompt, seat.version)

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
        self._go_on()

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
        make = self._wait_for(self._take(step), stop_requested)
        return None if make is None else make()  # here, not on the event loop

    async def _take(self, step: int) -> Callable[[], TrainBatch] | None:
        """What makes a step's batch or next part, whose groups are taken; None if a stop is requested first."""
        await self._wait_until(lambda: self._buffer.can_take(step) > 0)
        if not self._buffer.can_take(step):
            return None
        first = self._buffer.num_begun
        groups = self._buffer.take(step)
        if self._buffer.num_begun:
            return partial(make_part, self._cfg, groups[first:], step, first)
        late, finished = self._buffer.expire(step)
        self._abort(late)
        self._prompts.put_back(slot.prompt for slot in (*late, *finished))
        generated, drops = self._filter.drain()
        self._dispatch()
        since, self._last_batch = self._last_batch, time.perf_counter()
        seconds, metrics = self._last_batch - since, self._metrics()
        return lambda: make_batch(self._cfg, groups, generated, drops, step, seconds, metrics, first=first)

    def _metrics(self) -> Metrics:
        counts = {
            "rollout/ready": self._buffer.num_ready,
            "rollout/prompts_dropped": self._prompts.take_dropped(),
            "rollout/in_flight": self._buffer.num_in_flight,
            "rollout/workers": len(self._seats_up()),
            "rollout/workers_lost": self._losses,
            "rollout/groups_rerun": self._reruns,
            "rollout/groups_aborted": self._aborted,
        }
        return {name: float(count) for name, count in counts.items()}

    # Snapshots, evaluation, log-probs

    def publish(self, snapshot: Any, *, generates: bool = True) -> Metrics:
        return self._wait_for(self._publish(snapshot, generates), self._stop_requested)

    async def _publish(self, snapshot: Any, generates: bool) -> Metrics:
        self._spread.begin(snapshot)
        if not self._started:
            least = self._cfg.rollout.min_workers or self._cfg.rollout.num_workers
            await self._wait_until(lambda: len(self._seats_up()) >= least)
            self._started, self._last_batch = True, time.perf_counter()
        if self._paused:  # what workers have belongs to another history, or to none
            await self._until_spread()
            if not self._spread.is_done:
                return {}  # a stop is requested
        if generates:
            self._buffer.advance(snapshot.version)
            self._paused = False
            self._dispatch()
        return self._spread.metrics()

    async def _until_spread(self) -> None:
        """Every worker that is up has the newest snapshot, or a stop is requested."""
        await self._wait_until(lambda: self._spread.is_done)

    def start_evaluation(self, *, pinned: bool) -> None:
        self._wait_for(self._start_evaluation(pinned), self._stop_requested)

    async def _start_evaluation(self, pinned: bool) -> None:
        if not pinned:
            await self._until_spread()
        per_call = prompts_per_call(self._cfg, len(self._eval_prompts), len(self._seats_up()))
        self._evaluator.start(Evaluation(self._eval_prompts, per_call, self._spread.snapshot if pinned else None))
        self._dispatch()

    def evaluated(self, *, wait: bool) -> list[Group] | None:
        return self._wait_for(self._evaluated(wait), self._stop_requested)

    async def _evaluated(self, wait: bool) -> list[Group] | None:
        if wait:
            self._evaluator.is_awaited = True
            self._dispatch()
            await self._wait_until(lambda: self._evaluator.is_done)
        groups = self._evaluator.finished()
        if groups is not None:
            self._dispatch()
            show_printed(groups)
        return groups

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        return self._wait_for(self._logprobs(requests, adapter), self._stop_requested)

    async def _logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> dict[int, list[np.ndarray]]:
        await self._until_spread()
        seats = self._seats_up()
        answers = await all_or_none(self._stopping, (none_if_lost(seat.logprobs(requests, adapter)) for seat in seats))
        if answers is None:
            return {}
        return {seat.number: answer for seat, answer in zip(seats, answers, strict=True) if answer is not None}

    def state(self) -> RolloutState:
        return self._loop.run(self._state())

    async def _state(self) -> RolloutState:
        return self._prompts.state(self._buffer.in_flight(), self._buffer.finished())

    def rewind(self, state: RolloutState, version: int) -> None:
        """Workers stay up; the groups that they are running are aborted, and an evaluation is given up."""
        self._loop.run(self._rewind(state, version))

    async def _rewind(self, state: RolloutState, version: int) -> None:
        self._abort(list(self._running))
        self._prompts.give_up()
        self._reset(state, version)

    def close(self) -> None:
        """Stops every coroutine, then the workers, then what makes their prompts."""
        self._loop.run(self._close())
        self._maker.close()
        self._loop.close()

    async def _close(self) -> None:
        self._paused = True
        self._evaluator.give_up()
        self._prompts.give_up()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        seats = [*self._seats, *self._evaluator.own]
        endings = await asyncio.gather(*(seat.close() for seat in seats), return_exceptions=True)
        for seat, ending in zip(seats, endings, strict=True):
            if isinstance(ending, BaseException):  # the run is over: its result does not depend on this
                _log.warning("rollout worker %d did not close: %s", seat.number, described(ending))
