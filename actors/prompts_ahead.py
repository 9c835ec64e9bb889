"""Prompts made ahead of need by threads of their own: reading a row, encoding its images or tokenising it may take
long, and the pool's event loop must not wait for it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from tora.types import Prompt

Read = Callable[[int], Callable[[], Prompt]]
"""Reads the row at a position; what it returns makes the prompt, by any thread."""

LEAST_AHEAD = 16
"""Prompts that are made or being made at a time; a step's if those are more."""
_MAKERS = 4
"""Threads that make prompts of rows. Tokenisers, Pillow and file systems work beside each other, Python does not."""


class PromptSource(ABC):
    """Makes prompts beside its caller: a `PromptMaker` or an `actors.prompt_process.PromptProcess`."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[int, Future[Prompt]] | None] = SimpleQueue()
        """Positions and what their prompts go to, in order; None at the end."""

    def ask(self, position: int) -> Future[Prompt]:
        """Begin to make the prompt at a position."""
        future: Future[Prompt] = Future()
        self._asked.put((position, future))
        return future

    @abstractmethod
    def close(self) -> None:
        """Nothing that is asked for from now on is made."""


class PromptMaker(PromptSource):
    """One thread reads the rows, in the order in which they are asked for, because a dataset need not be safe for
    several; a few make prompts of them. All are daemons: a row that never comes does not keep the process alive."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self._read = read
        self._rows: SimpleQueue[tuple[Callable[[], Prompt], Future[Prompt]] | None] = SimpleQueue()
        for name, work in [("rows", self._read_rows), *([("prompts", self._make_prompts)] * _MAKERS)]:
            threading.Thread(target=work, name=name, daemon=True).start()

    def close(self) -> None:
        """The rows that are read by now are the last."""
        self._asked.put(None)

    def _read_rows(self) -> None:
        while (asked := self._asked.get()) is not None:
            position, future = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._rows.put((self._read(position), future))
            except BaseException as error:  # a dataset's row may be anything; whoever takes the prompt raises it
                future.set_exception(error)
        for _ in range(_MAKERS):
            self._rows.put(None)

    def _make_prompts(self) -> None:
        while (row := self._rows.get()) is not None:
            _fulfil(*row)
            del row  # with its images


def _fulfil(make: Callable[[], Prompt], future: Future[Prompt]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
