"""Ctrl-C and SIGTERM as requests to stop, from the first moment of a run to its last.

The first one is acknowledged at once. While there is nothing to save, which is so until the first step begins, it ends
the process; from then on the run ends after its step. A second one ends the process, whatever it is doing.

A signal's Python handler runs in the main thread and waits until that returns from C code, such as an import or a step.
So a thread of its own reads the numbers that Python writes into a pipe at the moment they arrive.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tora.launch.leftovers import Leftovers

STOPPED = 130
"""Exit code of a run that a signal ended."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_END_S = 2.0
"""Seconds for removing what the run would leave, before the process ends in any case."""


class Stop:
    """Whether the user has asked this process to stop. Never, unless `listen` is called."""

    def __init__(self, *, speaks: bool = True) -> None:
        """`speaks`: acknowledge signals on stderr."""
        self.saves = False
        """Whether the run needs time to end: a first signal only sets `requested`."""
        self.leftovers: Leftovers | None = None
        self._speaks = speaks
        self._count = self._handled = 0
        self._lock = threading.RLock()
        self._ends: threading.Thread | None = None
        self._callbacks: list[Callable[[], object]] = []

    @property
    def requested(self) -> bool:
        return self._count > 0

    def __call__(self) -> bool:
        return self.requested

    def let_save(self, saves: bool) -> None:
        """Sets `saves`."""
        self.saves = saves

    def at_end(self, callback: Callable[[], object]) -> None:
        """Call this when a signal ends the process. It must be quick."""
        self._callbacks.append(callback)

    def listen(self) -> None:
        """Handle signals from now on. Only for the main thread of a program, which ends by `exit`."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def exit(self, code: int) -> NoReturn:
        """End the process, without Python's shutdown; all its work must be done and written."""
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        if self.leftovers is not None:
            self.leftovers.remove(10.0)
        with self._lock:
            os._exit(STOPPED if self.requested else code)

    def _watch(self, pipe: int) -> None:
        count = 0
        while numbers := os.read(pipe, 64):
            for _ in filter(_SIGNALS.__contains__, numbers):
                count += 1
                self._on_signal(count)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Needed where another library has taken the pipe's place."""
        self._handled += 1
        self._on_signal(self._handled)

    def _on_signal(self, count: int) -> None:
        """`count`: signals so far, as one of the two listeners has counted them."""
        with self._lock:
            if count <= self._count:
                return
            self._count = count
            if self._ends is not None:
                return
            if count == 1 and self.saves:
                self._say("stopping after this step; again to end now")
                return
            self._say("stopping now" if count == 1 else "ending now")
            self._ends = threading.Thread(target=self._end, daemon=True)
            self._ends.start()

    def _say(self, sentence: str) -> None:
        if self._speaks:
            with suppress(OSError):
                os.write(2, f"\n{sentence}\n".encode())

    def _end(self) -> NoReturn:
        last = threading.Timer(_END_S + 0.5, os._exit, [STOPPED])  # a flush may wait for its reader
        last.daemon = True
        last.start()
        with suppress(Exception):
            sys.stdout.flush()
        # the main thread goes on until the process ends, and what it says now is of no interest
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        for callback in self._callbacks:
            with suppress(Exception):
                callback()
        if self.leftovers is not None:
            self.leftovers.remove(_END_S)
        os._exit(STOPPED)
