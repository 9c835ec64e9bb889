"""Prompts made ahead of need by a thread of their own: tokenising a row or reading its images may take long, and the
pool's event loop must not wait for it. One thread, because datasets and tokenizers need not be safe for several."""

from __future__ import annotations

import asyncio
import threading
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue

from tora.errors import OverlongPrompt
from tora.types import Group, Prompt, RolloutState

_LEAST_AHEAD = 16
"""Prompts that are made or being made at a time; a step's if those are more."""


class PromptMaker:
    """The thread. A daemon: a row that never comes does not keep the process alive."""

    def __init__(self, prompt_at: Callable[[int], Prompt]) -> None:
        self._prompt_at = prompt_at
        self._asked: SimpleQueue[tuple[int, Future[Prompt]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._make, name="prompts", daemon=True)
        self._thread.start()

    def ask(self, position: int) -> Future[Prompt]:
        future: Future[Prompt] = Future()
        self._asked.put((position, future))
        return future

    def close(self) -> None:
        """The prompt that is being made is the last."""
        self._asked.put(None)

    def _make(self) -> None:
        while (asked := self._asked.get()) is not None:
            position, future = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._prompt_at(position))
            except BaseException as error:  # a dataset's row may be anything; whoever takes the prompt raises it
                future.set_exception(error)


class PromptsAhead:
    """The prompts that an interrupted run left pending, then the stream in order, as `PromptCursor` yields them."""

    def __init__(self, maker: PromptMaker, state: RolloutState, *, per_step: int, on_ready: Callable[[], None]) -> None:
        """`per_step`: the groups of a step. `on_ready`: called on the event loop for each prompt that is made.

        All methods are for the event loop's thread.
        """
        self._maker, self._ahead, self._on_ready = maker, max(_LEAST_AHEAD, per_step), on_ready
        self._position = state.cursor
        self._pending = deque(sorted(state.pending))
        self._made: list[tuple[int, Future[Prompt]]] = []
        """By position in the stream, in order."""
        self._from_stream: set[int] = set()
        """Positions in `_made` that were not pending."""
        self._dropped = 0

    def take(self) -> Prompt | None:
        """The next prompt that is not dropped; None if it is not made yet. Raises what the stream raises, and then
        stays where it is."""
        self._fill()
        while self._made and self._made[0][1].done():
            try:
                prompt = self._made[0][1].result()
            except OverlongPrompt:
                prompt = None
                self._dropped += 1
            self._from_stream.discard(self._made.pop(0)[0])
            self._fill()
            if prompt is not None:
                return prompt
        return None

    def _fill(self) -> None:
        while len(self._made) < self._ahead:
            if self._pending:
                position = self._pending.popleft()
            else:
                position, self._position = self._position, self._position + 1
                self._from_stream.add(position)
            self._ask(position)

    def _ask(self, position: int) -> None:
        future, loop = self._maker.ask(position), asyncio.get_running_loop()
        insort(self._made, (position, future), key=lambda item: item[0])
        future.add_done_callback(lambda _: _call(loop, self._on_ready))

    def put_back(self, prompts: Iterable[Prompt]) -> None:
        """These come next again, in their order in the stream."""
        for prompt in prompts:
            future: Future[Prompt] = Future()
            future.set_result(prompt)
            insort(self._made, (prompt.id, future), key=lambda item: item[0])

    def take_dropped(self) -> int:
        """Prompts dropped since the last call."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def state(self, in_flight: Iterable[int], finished: Sequence[tuple[int, Group]] = ()) -> RolloutState:
        """Prompts that nobody has taken count as not begun."""
        again = [position for position, _ in self._made if position not in self._from_stream]
        cursor = min(self._from_stream, default=self._position)
        return RolloutState(cursor, sorted([*self._pending, *again, *in_flight]), list(finished))

    def give_up(self) -> None:
        """No more prompts are made for this object."""
        for _, future in self._made:
            future.cancel()


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits for prompts
        loop.call_soon_threadsafe(callback)
