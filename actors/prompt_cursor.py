"""The position in the prompt stream: which prompt is next, and what a checkpoint says of it."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from tora.errors import OverlongPrompt
from tora.types import Group, Prompt, RolloutState


class PromptCursor:
    """Yields the prompts that an interrupted run left pending, then the stream, in order, each once it is made."""

    def __init__(
        self,
        ask: Callable[[int], Future[Prompt]],
        state: RolloutState,
        *,
        ahead: int = 1,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        """`ask` begins to make the prompt at a position. `ahead`: prompts that are made or being made at a time, from
        the first `is_ready` or `take` on. `on_ready`: called, by any thread, when there may be a prompt after these had
        none.

        All methods are for one thread.
        """
        self._make, self._ahead, self._on_ready = ask, ahead, on_ready
        self._position = state.cursor
        self._pending = deque(sorted(state.pending))
        self._asked: list[tuple[int, Future[Prompt]]] = []
        """By position in the stream, in order."""
        self._from_stream: set[int] = set()
        """Positions in `_asked` that were not pending."""
        self._dropped = 0
        self._awaited: Future[Prompt] | None = None
        """What `on_ready` will be called for."""

    def is_ready(self) -> bool:
        """Whether the next prompt, or an error, has come."""
        while len(self._asked) < self._ahead:
            self._ask_next()
        future = self._asked[0][1]
        if future.done():
            return True
        if future is not self._awaited:
            self._awaited = future
            future.add_done_callback(lambda _: self._on_ready())
        return False

    def take(self) -> Prompt | None:
        """The next prompt that is not dropped; None if it is not made yet. Raises what the stream raises, and then
        stays where it is."""
        while self.is_ready():
            position, future = self._asked[0]
            try:
                prompt = future.result()
            except OverlongPrompt:
                prompt = None
                self._dropped += 1
            del self._asked[0]
            self._from_stream.discard(position)
            if prompt is not None:
                return prompt
        return None

    def _ask_next(self) -> None:
        if self._pending:
            position = self._pending.popleft()
        else:
            position, self._position = self._position, self._position + 1
            self._from_stream.add(position)
        self._insert(position, self._make(position))

    def _insert(self, position: int, future: Future[Prompt]) -> None:
        insort(self._asked, (position, future), key=lambda item: item[0])

    def put_back(self, prompts: Iterable[Prompt]) -> None:
        """These come next again, in their order in the stream."""
        for prompt in prompts:
            future: Future[Prompt] = Future()
            future.set_result(prompt)
            self._insert(prompt.id, future)

    def take_dropped(self) -> int:
        """Prompts dropped since the last call."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def state(self, in_flight: Iterable[int], finished: Sequence[tuple[int, Group]] = ()) -> RolloutState:
        """Prompts that nobody has taken count as not begun."""
        again = [position for position, _ in self._asked if position not in self._from_stream]
        cursor = min(self._from_stream, default=self._position)
        return RolloutState(cursor, sorted([*self._pending, *again, *in_flight]), list(finished))

    def give_up(self) -> None:
        """No more prompts are made for this object."""
        for _, future in self._asked:
            future.cancel()


def made_at_once(prompt_at: Callable[[int], Prompt]) -> Callable[[int], Future[Prompt]]:
    """For a cursor whose prompts are made when they are asked for, by the thread that asks."""

    def ask(position: int) -> Future[Prompt]:
        future: Future[Prompt] = Future()
        try:
            future.set_result(prompt_at(position))
        except BaseException as error:  # whoever takes the prompt raises it
            future.set_exception(error)
        return future

    return ask
