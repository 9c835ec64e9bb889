"""Reward functions in child processes, with a time limit per call.

A function may wait forever for the network, or compute inside one C call that holds the interpreter lock; only killing
its process ends it. Each child therefore runs one call at a time. If a call takes too long, its child is killed and a
new one starts. State that functions keep in their modules is separate in each child.

A call covers a group. If it fails as a whole, it is repeated for each completion alone, under the same limit, so that
one bad completion does not cost the others their scores. A completion that takes too long even then scores the
function's `timeout_score` and is reported as a failure.

Functions that are `async def` share a child and run there concurrently, those of one group together; a limit cancels
the call and leaves the child.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, TypeVar

from tora.config.schema import Component
from tora.errors import RolloutError, portable
from tora.rewards.notes import AT_START, Notes, TrainerState
from tora.rewards.printed import Printed
from tora.rewards.rewarder import (
    Call,
    Column,
    Completion,
    Unanswered,
    build_rewarder,
    combine,
    setting_by_name,
    took_longer,
    total,
)
from tora.types import FailedReward, Prompt

T = TypeVar("T")
_CLOSED = "the processes for reward functions are closed"
_STARTS = 3
START_S = 300.0
"""Time limit for a child to start and import the functions."""
_CANCEL_S = 2.0
"""Seconds that async functions may take to end once their limit has cancelled them."""
_MAIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {0}; {0}.serve()"


def spawn(module: str, timeout_s: float) -> tuple[subprocess.Popen[bytes], Connection]:
    """A child that runs `module.serve()`, and the connection to it. The child's arguments are this process's path for
    imports, the connection's descriptor and `timeout_s`."""
    ours, theirs = Pipe()
    with theirs:
        descriptor = theirs.fileno()
        arguments = [json.dumps(sys.path), str(descriptor), str(timeout_s)]
        command = [sys.executable, "-c", _MAIN.format(module), *arguments]
        limit(ours, socket.SO_SNDTIMEO, timeout_s)
        return subprocess.Popen(command, pass_fds=[descriptor]), ours


def again(start: Callable[[], T]) -> T:
    """`start()`, for a process like others that did start: one that dies meanwhile was killed, and is tried again."""
    for _ in range(_STARTS - 1):
        with suppress(RolloutError):
            return start()
    return start()


def limit(connection: Connection, direction: int, seconds: float) -> None:
    """From now on sending or receiving raises BlockingIOError after that many seconds without a byte: a child that is
    stopped as a whole neither reads a question that is larger than the pipe, nor writes the rest of its answer.

    `direction`: socket.SO_SNDTIMEO or SO_RCVTIMEO.
    """
    seconds = min(max(seconds, 0.001), 1e9)
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.setsockopt(socket.SOL_SOCKET, direction, value)


class RewardProcesses:
    """The `tora.protocols.Rewarder` for a config's `rewards`. Thread-safe."""

    def __init__(
        self, components: Sequence[Component], *, timeout_s: float, num_processes: int, collects_prints: bool = False
    ) -> None:
        """Starts one child; while all children are busy, more are started, up to `num_processes`. `collects_prints`:
        what functions print is among the notes too, for a machine whose output the user does not see.

        Raises ConfigError as `build_rewarder` does, what a reward function's module raises when it is imported, and
        RolloutError if the child does not start.
        """
        self._components, self._timeout_s, self._num_processes = components, timeout_s, num_processes
        self._collects_prints = collects_prints
        self._free = threading.BoundedSemaphore(num_processes)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._closed = False
        first = self._start()
        self._idle.append(first)
        self._is_async, self._take_images = first.is_async, first.take_images
        self._weights = setting_by_name(components, "weight", 1.0)
        self._timeout_scores = setting_by_name(components, "timeout_score", 0.0)
        self._names = list(self._weights)

    def __call__(
        self,
        prompt: Prompt,
        texts: Sequence[Completion],
        token_ids: Sequence[Sequence[int]],
        known: Mapping[int, Column] = MappingProxyType({}),
        *,
        state: TrainerState = AT_START,
        notes: Notes | None = None,
    ) -> list[dict[str, float] | FailedReward]:
        """See `Rewarder`. Raises RolloutError if a new child does not start."""
        notes = Notes() if notes is None else notes
        bare = prompt if self._take_images else replace(prompt, images=())
        numbers = [index for index in range(len(self._names)) if index not in known]
        calls = [Call(index, texts, token_ids, state=state) for index in numbers]
        together = [call for call in calls if self._is_async[call.index]]
        answers = {call.index: self._ask(bare, [call])[0] for call in calls if call not in together}
        if together:
            answers |= zip((call.index for call in together), self._ask(bare, together), strict=True)
        columns = {**known, **{call.index: self._complete(bare, call, answers[call.index], notes) for call in calls}}
        return combine([columns[index] for index in range(len(self._names))], self._names)

    def total(self, parts: Mapping[str, float]) -> float:
        return total(parts, self._weights)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for child in self._all:
                child.kill() if child in self._idle else child.end()
            self._all.clear()
            self._idle.clear()

    def _complete(self, prompt: Prompt, call: Call, answer: Column | Unanswered, notes: Notes) -> Column:
        """The call's column; repeated for each completion alone if `answer` has no score for any. `notes` gets those of
        the call, or of the calls that replace it."""
        is_lost = isinstance(answer, Unanswered) or all(isinstance(score, FailedReward) for score in answer)
        if len(call.texts) > 1 and is_lost:
            pairs = zip(call.texts, call.token_ids, strict=True)
            alone = [Call(call.index, [text], [ids], state=call.state) for text, ids in pairs]
            column = [
                score for each in self._ask_each(prompt, alone, answer) for score in self._settled(call.index, each)
            ]
            for place, each in enumerate(alone):
                notes.add(each.notes, [place])
            return column
        notes.add(call.notes, range(len(call.texts)))
        return self._settled(call.index, answer, len(call.texts))

    def _ask_each(
        self, prompt: Prompt, alone: Sequence[Call], before: Column | Unanswered
    ) -> list[Column | Unanswered]:
        """The answers to calls for one completion each. `before`: the answer when they were one call."""
        if self._is_async[alone[0].index]:
            answers = self._ask(prompt, alone)
            if not all(isinstance(answer, Unanswered) for answer in answers):
                return answers
            before = answers[0]  # all timed out, or one of them blocked the event loop
        if not isinstance(before, Unanswered):
            return [self._ask(prompt, [call])[0] for call in alone]
        with ThreadPoolExecutor(self._num_processes) as pool:
            return list(pool.map(lambda call: self._ask(prompt, [call])[0], alone))

    def _settled(self, index: int, answer: Column | Unanswered, count: int = 1) -> Column:
        if not isinstance(answer, Unanswered):
            return answer
        name = self._names[index]
        parts = {name: self._timeout_scores[name]} if answer.is_timeout else None
        return [FailedReward(name, answer.reason, parts)] * count

    def _ask(self, prompt: Prompt, calls: Sequence[Call]) -> list[Column | Unanswered]:
        """One child's answers, and the calls' notes in them. If there are several calls, all must be of async
        functions."""
        extra_s = _CANCEL_S if self._is_async[calls[0].index] else 0.0
        with self._child() as child:
            answer = child.ask((prompt, calls), self._timeout_s, extra_s)
        if isinstance(answer, Unanswered):
            return [answer] * len(calls)
        columns, noted, printed = answer
        for call, theirs in zip(calls, noted, strict=True):
            call.notes.add(theirs, range(len(call.texts)))
        if self._collects_prints:
            calls[0].notes.printed += printed
        return columns

    @contextmanager
    def _child(self):
        with self._free:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            child = child or again(self._start)
            try:
                yield child
            finally:
                with self._lock:
                    if child.alive:
                        self._idle.append(child)
                    else:
                        self._all.discard(child)

    def _start(self) -> _Child:
        if self._closed:
            raise RolloutError(_CLOSED)
        child = _Child(self._components, self._timeout_s)
        with self._lock:
            if not self._closed:
                self._all.add(child)
                return child
        child.kill()
        raise RolloutError(_CLOSED)


class _Child:
    def __init__(self, components: Sequence[Component], timeout_s: float) -> None:
        """Raises what `build_rewarder` raises in the child, and RolloutError if the child does not start."""
        self._process, self._connection = spawn("tora.rewards.processes", timeout_s)
        limit(self._connection, socket.SO_RCVTIMEO, timeout_s)
        answer = self.ask(components, START_S)
        if isinstance(answer, Exception):
            self.kill()
            raise answer
        if isinstance(answer, Unanswered):
            raise RolloutError(f"a process for reward functions did not start: it {answer.reason}")
        self.is_async: list[bool] = answer[0]
        """For each function."""
        self.take_images: bool = answer[1]
        """Whether any function does."""

    @property
    def alive(self) -> bool:
        return not self._connection.closed

    def ask(self, question: Any, limit_s: float, extra_s: float = 0.0) -> Any:
        """The child's answer. If there is none within `limit_s + extra_s`, kills the child and says that it took longer
        than `limit_s`."""
        try:
            self._connection.send(question)
            if self._connection.poll(limit_s + extra_s):
                return self._connection.recv()
            unanswered = Unanswered(took_longer(limit_s), is_timeout=True)
        except BlockingIOError:
            unanswered = Unanswered(took_longer(limit_s), is_timeout=True)
        except (EOFError, OSError):
            unanswered = Unanswered("ended its process", is_timeout=False)
        self.kill()
        return unanswered

    def end(self) -> None:
        """Ends the process. Called by another thread than the one that waits for its answer, which notices the end."""
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def serve() -> None:
    """The main function of a child: scores groups until its parent closes the connection or dies."""
    import resource

    connection, timeout_s = Connection(int(sys.argv[2])), float(sys.argv[3])
    outlive_stops()
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        rewarder = build_rewarder(connection.recv())
    except BaseException as error:  # a mistake in the config, or whatever a user's module raises, SystemExit too
        say(connection, portable(error))
        return
    numbers = range(len(rewarder.rewards))
    say(connection, (list(map(rewarder.is_async, numbers)), any(map(rewarder.takes_images, numbers))))
    sys.stdout = printed = Printed(sys.stdout)
    # If a function holds the interpreter lock forever and the parent is gone, only the kernel can end it.
    most_s, hard = int(timeout_s * (os.cpu_count() or 1)) + 2, resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        try:
            prompt, calls = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        if hard == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + most_s, hard))
        columns = rewarder.columns(prompt, calls, timeout_s)
        say(connection, (columns, [call.notes for call in calls], printed.take()))


def say(connection: Connection, message: Any) -> None:
    """Send to the parent. One that no longer listens needs this process no more, which then ends."""
    try:
        connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit()


def outlive_stops() -> None:
    """Ctrl-C in a terminal also reaches a child, as does SIGTERM from what stops all processes of a job, and the parent
    may still have to finish a step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # programs that a user's code starts would inherit SIG_IGN


def end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent has."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
