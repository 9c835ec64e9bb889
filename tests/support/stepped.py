"""Runs a vLLM engine step by step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TIMEOUT_S = 30.0


class StepGate:
    """The `step` of a `VLLMEngine`. While it is shut, the engine takes only the steps that the test allows."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed: int | None = None  # steps that may still begin; None while open
        self._waiting = False
        self._error: BaseException | None = None

    def __call__(self, llm: Any) -> Any:
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._allowed is None or self._allowed > 0 or self._error is not None)
            if self._error is not None:
                raise self._error
            self._waiting = False
        outputs = llm.step()
        with self._changed:
            if self._allowed is not None:
                self._allowed -= 1
            self._changed.notify_all()
        return outputs

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Steps need `allow` until the context ends."""
        with self._changed:
            self._allowed = 0
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        with self._changed:
            self._allowed = None
            self._changed.notify_all()

    def allow(self, count: int) -> None:
        """Allows `count` steps and returns once they are done."""
        with self._changed:
            assert self._allowed == 0, "the gate is shut, and no step is under way"
            self._allowed = count
            self._changed.notify_all()
            self._wait(lambda: self._allowed == 0)

    def fail(self, error: BaseException) -> None:
        """Makes the waiting step raise `error`."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def wait_for_engine(self) -> None:
        """Returns once the engine's thread is about to take a step."""
        with self._changed:
            self._wait(lambda: self._waiting)

    def _wait(self, holds: Any) -> None:
        assert self._changed.wait_for(holds, _TIMEOUT_S), "timed out"
