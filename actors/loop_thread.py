"""An event loop in a thread of its own, for callers in other threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_STOP_POLL_S = 0.2


class LoopThread:
    def __init__(self, name: str, watch: Callable[[], object] = lambda: None) -> None:
        """`watch`: called again and again while `wait_for` waits. What it raises ends the wait."""
        self._loop, self._watch = asyncio.new_event_loop(), watch
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def wait_for(
        self, coroutine: Coroutine[Any, Any, T], stop_requested: Callable[[], bool], on_stop: Callable[[], None]
    ) -> T:
        """The coroutine's result. `on_stop` is called on the loop, once or more, when a stop is requested meanwhile."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while not wait_for_futures([future], timeout=_STOP_POLL_S).done:
                self._watch()
                if stop_requested():
                    self._loop.call_soon_threadsafe(on_stop)
        finally:
            future.cancel()  # nothing to a finished one
        return future.result()

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call it on the loop, from any thread. Nothing happens once the loop is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def all_or_none(stopping: asyncio.Event, calls: Iterable[Coroutine[Any, Any, T]]) -> list[T] | None:
    """All results, or None if `stopping` is set first, which cancels the calls. Raises the first error of a call."""
    together = asyncio.gather(*calls)
    stopped = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({together, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return together.result() if together.done() else None
    finally:
        stopped.cancel()
        if not together.done():
            together.cancel()
            with suppress(asyncio.CancelledError):
                await together
