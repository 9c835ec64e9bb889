"""Reward functions in child processes, with a time limit per call.

A function may wait forever for the network, or compute inside one C call that holds the interpreter lock; only killing
its process ends it. Each child therefore runs one call at a time. If a call takes too long, its child is killed and a
new one starts. State that functions keep in their modules is separate in each child.

A call covers a group. If it fails as a whole, it is repeated for each completion alone, so that one bad completion does
not cost the others their scores; each repeat gets an equal share of the time limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from tora.config.schema import Component
from tora.errors import RolloutError
from tora.rewards.rewarder import Column, build_rewarder, combine, names_and_weights, total
from tora.types import FailedReward, Prompt

_START_S = 300.0
"""Time limit for a child to start and import the functions."""
_MAIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from tora.rewards import processes; processes.serve()"


class RewardProcesses:
    """The `tora.protocols.Rewarder` for a config's `rewards`. Thread-safe."""

    def __init__(self, components: Sequence[Component], *, timeout_s: float, num_processes: int) -> None:
        """Starts one child; while all children are busy, more are started, up to `num_processes`.

        Raises `ConfigError` as `build_rewarder` does, what a reward function's module raises when it is imported, and
        `RolloutError` if the child does not start.
        """
        self._components, self._timeout_s = components, timeout_s
        self._free = threading.BoundedSemaphore(num_processes)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._idle.append(self._start())
        self._names, self._weights = names_and_weights(components)

    def __call__(
        self, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
    ) -> list[dict[str, float] | FailedReward]:
        """See `Rewarder`. Raises `RolloutError` if a new child does not start."""
        bare = replace(prompt, images=())
        return combine([self._column(index, bare, texts, token_ids) for index in range(len(self._names))], self._names)

    def total(self, parts: dict[str, float]) -> float:
        return total(parts, self._weights)

    def close(self) -> None:
        with self._lock:
            for child in self._all:
                child.kill()
            self._all.clear()
            self._idle.clear()

    def _column(self, index: int, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> Column:
        """The scores of one function."""
        whole = self._ask(self._timeout_s, index, prompt, texts, token_ids)
        if len(texts) == 1 or not all(isinstance(score, FailedReward) for score in whole):
            return whole
        limit_s, pairs = self._timeout_s / len(texts), zip(texts, token_ids, strict=True)
        return [score for text, ids in pairs for score in self._ask(limit_s, index, prompt, [text], [ids])]

    def _ask(
        self, limit_s: float, index: int, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
    ) -> Column:
        with self._child() as child:
            answer = child.ask((index, prompt, texts, token_ids), limit_s)
        if isinstance(answer, str):
            return [FailedReward(self._names[index], answer)] * len(texts)
        return answer

    @contextmanager
    def _child(self):
        with self._free:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            child = child or self._start()
            try:
                yield child
            finally:
                with self._lock:
                    if child.alive:
                        self._idle.append(child)
                    else:
                        self._all.discard(child)

    def _start(self) -> _Child:
        child = _Child(self._components, self._timeout_s)
        with self._lock:
            self._all.add(child)
        return child


class _Child:
    def __init__(self, components: Sequence[Component], timeout_s: float) -> None:
        """Raises what `build_rewarder` raises in the child, and `RolloutError` if the child does not start."""
        self._connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            arguments = [json.dumps(sys.path), str(descriptor), str(timeout_s)]
            self._process = subprocess.Popen([sys.executable, "-c", _MAIN, *arguments], pass_fds=[descriptor])
        answer = self.ask(components, _START_S)
        if isinstance(answer, Exception):
            self.kill()
            raise answer
        if answer is not None:
            raise RolloutError(f"a process for reward functions did not start: {answer}")

    @property
    def alive(self) -> bool:
        return not self._connection.closed

    def ask(self, question: Any, limit_s: float) -> Any:
        """The child's answer. If there is none within `limit_s`, kills the child and returns the reason, a string."""
        try:
            self._connection.send(question)
            if self._connection.poll(limit_s):
                return self._connection.recv()
            reason = f"took longer than {limit_s:.3g} s"
        except (EOFError, OSError):
            reason = "ended its process"
        self.kill()
        return reason

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def serve() -> None:
    """The main function of a child: scores groups until its parent closes the connection or dies."""
    import resource
    import signal

    connection, timeout_s = Connection(int(sys.argv[2])), float(sys.argv[3])
    # Ctrl-C in a terminal also reaches the child, and the parent may still have to finish a step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        rewarder = build_rewarder(connection.recv())
    except Exception as error:  # a mistake in the config, or an error in a user's module
        connection.send(error)
        return
    connection.send(None)
    # If a function holds the interpreter lock forever and the parent is gone, only the kernel can end it.
    most_s, hard = int(timeout_s * (os.cpu_count() or 1)) + 2, resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        try:
            index, prompt, texts, token_ids = connection.recv()
        except EOFError:
            return
        if hard == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + most_s, hard))
        connection.send(rewarder.column(index, prompt, texts, token_ids))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
