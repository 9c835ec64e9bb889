"""Ends a learner rank that hangs, and leaves the stacks of its threads."""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class Watchdog:
    """Within `watching`, ends this process once `limit_s` seconds pass without a call of `mark`.

    A thread in C does it, which needs no interpreter lock: a hung kernel or collective may hold it for ever.
    """

    def __init__(self, limit_s: float, stacks: Path | None) -> None:
        """`stacks`: the file to which the stacks of all threads are appended. It is made by the first call of
        `watching`; without one, and where it cannot be made, they go to stderr."""
        self._limit_s, self._stacks = min(limit_s, threading.TIMEOUT_MAX / 2), stacks
        self._file: TextIO | None = None
        self._is_watching = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._file, self._is_watching = self._file or _opened(self._stacks), True
        self.mark()
        try:
            yield
        finally:
            self._is_watching = False
            faulthandler.cancel_dump_traceback_later()

    def mark(self) -> None:
        """The process gets on."""
        if self._is_watching:
            assert self._file is not None
            faulthandler.dump_traceback_later(self._limit_s, exit=True, file=self._file)


def stacks_file(output_dir: str, rank: int) -> Path:
    return Path(output_dir) / "logs" / f"learner_rank_{rank}.txt"


def size(stacks: Path) -> int:
    """Bytes; 0 for no file. Only a process that hung has written any."""
    try:
        return stacks.stat().st_size
    except OSError:
        return 0


def _opened(path: Path | None) -> TextIO:
    if path is None:
        return sys.stderr
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError:
        return sys.stderr
