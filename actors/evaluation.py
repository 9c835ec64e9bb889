"""An evaluation as a queue of calls of a few prompts each, so that the workers that are quick take more of them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from actors.seat import Seat, is_fatal
from tora.config.schema import RunConfig
from tora.errors import SnapshotLost, WorkerLost
from tora.types import Group, GroupResult, Prompt

_log = logging.getLogger(__name__)
_LEAST_CALLS = 4
"""For each worker, of an engine that runs one call at a time: many small calls would be slow, and few could not be
shared out."""


class Evaluation:
    """Held-out prompts under one policy version. Pure bookkeeping."""

    def __init__(self, prompts: Sequence[Prompt], per_call: int, snapshot: Any) -> None:
        """`snapshot`: of the version, or None for whichever a worker serves."""
        self.snapshot, self._prompts = snapshot, prompts
        starts = range(0, len(prompts), per_call)
        self._waiting = deque(range(start, min(start + per_call, len(prompts))) for start in starts)
        self._groups: dict[int, Group] = {}

    @property
    def has_waiting(self) -> bool:
        """Whether a call waits for a worker."""
        return bool(self._waiting)

    def take(self) -> range:
        """The next call, as the numbers of its prompts."""
        return self._waiting.popleft()

    def give_back(self, call: range) -> None:
        """Its worker was lost: it comes next."""
        self._waiting.appendleft(call)

    def prompts(self, call: range) -> Sequence[Prompt]:
        return self._prompts[call.start : call.stop]

    def put(self, call: range, results: Sequence[GroupResult]) -> None:
        for number, result in zip(call, results, strict=True):
            self._groups[number] = result.with_prompt(self._prompts[number])

    @property
    def is_done(self) -> bool:
        return len(self._groups) == len(self._prompts)

    def groups(self) -> list[Group]:
        """One per prompt, in their order, once all are done."""
        return [self._groups[number] for number in range(len(self._prompts))]


def prompts_per_call(cfg: RunConfig, num_prompts: int, num_workers: int) -> int:
    """As many as make the rollouts of one training group, or more for an engine that runs one call at a time."""
    assert cfg.eval is not None
    like_a_group = max(1, cfg.grpo_samples // cfg.eval.samples)
    if cfg.rollout.engine == "vllm":
        return like_a_group
    return max(like_a_group, -(-num_prompts // (_LEAST_CALLS * max(1, num_workers))))


class Evaluator:
    """Runs one evaluation at a time on the pool's seats. All calls come from the pool's event loop.

    It may have seats of its own, whose workers do nothing else. Without one that is up, and once it is awaited, its
    calls go to the pool's seats too: they take the room that groups leave, but one of each seat at all times; once it
    is awaited they go first.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_call_ended: Callable[[], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """`seats`: the pool's list, which grows. `on_call_ended`: called when a seat has room again. `fail`: called
        with an error that ends the run."""
        self._seats, self._spawn, self._on_call_ended, self._fail = seats, spawn, on_call_ended, fail
        self.own: list[Seat] = []
        self._evaluation: Evaluation | None = None
        self.is_awaited = False

    def add(self, count: int, make_seat: Callable[..., Seat]) -> list[Seat]:
        """Seats of its own, which the caller starts. `make_seat` takes a number and `SeatEvents`."""
        self.own += [make_seat(number, events=self) for number in range(count)]
        return self.own

    def on_worker_up(self, seat: Seat) -> None:
        self._on_call_ended()

    def on_worker_lost(self, seat: Seat, error: BaseException) -> None:
        """The pool's workers do its work meanwhile, so that no number of losses ends the run."""
        if is_fatal(error):
            self._fail(error)
            return
        reason = f"{error}; {seat.kept_log}" if seat.kept_log else str(error)
        _log.warning("evaluation worker %d is lost (%s)", seat.number, reason)
        self._on_call_ended()

    def on_snapshot_lost(self, snapshot: Any) -> None:
        """The pool hears it from its own seats."""

    def on_capacity(self) -> None:
        self._on_call_ended()

    def start(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation

    def give_up(self) -> None:
        """Calls that are running come to nothing."""
        self._evaluation, self.is_awaited = None, False

    @property
    def goes_first(self) -> bool:
        """Whether its calls wait for room that no group may take."""
        return self.is_awaited and self._evaluation is not None and self._evaluation.has_waiting

    @property
    def is_done(self) -> bool:
        """Also without an evaluation."""
        return self._evaluation is None or self._evaluation.is_done

    def finished(self) -> list[Group] | None:
        """The groups of a finished evaluation, once; None if there is none."""
        if self._evaluation is None or not self._evaluation.is_done:
            return None
        groups = self._evaluation.groups()
        self.give_up()
        return groups

    def dispatch(self) -> None:
        """Start calls until none waits or seats run out."""
        evaluation = self._evaluation
        while evaluation is not None and evaluation.has_waiting and (seat := self._least_loaded()) is not None:
            call = evaluation.take()
            seat.num_evaluations += 1
            self._spawn(self._run(call, seat, evaluation)).add_done_callback(partial(self._on_ended, seat))

    def _least_loaded(self) -> Seat | None:
        own = [seat for seat in self.own if seat.up]
        seats = [*own, *self._seats] if self.is_awaited or not own else own
        free = (seat for seat in seats if seat.up and _has_room(seat))
        return min(free, key=lambda seat: (seat.num_evaluations, seat.outstanding_tokens), default=None)

    async def _run(self, call: range, seat: Seat, evaluation: Evaluation) -> None:
        try:
            evaluation.put(call, await seat.evaluate(evaluation.prompts(call), evaluation.snapshot))
        except SnapshotLost:  # with the learner: it comes back without this version
            if evaluation is self._evaluation:
                self.give_up()
        except WorkerLost:
            evaluation.give_back(call)
        except Exception as error:
            self._fail(error)

    def _on_ended(self, seat: Seat, task: asyncio.Task[None]) -> None:
        """Also of a task that was cancelled, perhaps before it began."""
        seat.num_evaluations -= 1
        self._on_call_ended()


def _has_room(seat: Seat) -> bool:
    return not seat.num_evaluations or len(seat.slots) + seat.num_evaluations < seat.limit
