"""Ends the generation of a group that nobody needs any more, whatever its worker is doing for it.

The thread that runs a group is given a flag; every engine call that it makes, for a part or for a turn, ends with
`Aborted` once the flag is set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tora.errors import RolloutError

_flag: ContextVar[threading.Event | None] = ContextVar("abort", default=None)


class Aborted(RolloutError):
    """The caller's work was aborted."""

    def __init__(self) -> None:
        super().__init__("the group was aborted")


@contextmanager
def abortable(flag: threading.Event) -> Iterator[None]:
    """Within the block, this thread's engine calls end once `flag` is set."""
    token = _flag.set(flag)
    try:
        yield
    finally:
        _flag.reset(token)


def current_flag() -> threading.Event | None:
    """This thread's flag; None for work that is never aborted."""
    return _flag.get()


def raise_if_aborted() -> None:
    if (flag := current_flag()) is not None and flag.is_set():
        raise Aborted
