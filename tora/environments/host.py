"""The process that holds environments: it resets them, calls their tools, and scores what they saw.

Each environment runs in a thread of its own, so a slow one delays no other. Answers leave as soon as they are ready.
Whatever an environment raises is an answer too.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from tora.config.components import instantiate, locate, restore
from tora.config.environments import COLUMN, key_of
from tora.config.schema import Component
from tora.environments.base import resolve, tool_methods
from tora.environments.content import Content, content_of, text_content
from tora.environments.tools import ToolCall
from tora.errors import ConfigError, portable
from tora.rewards.processes import end_with_parent, outlive_stops, say
from tora.rewards.rewarder import Call, Column, Unanswered, build_rewarder
from tora.types import Prompt

_LONGEST_ERROR = 2000
"""Characters of an error that the policy is told."""
Key = tuple[int, int]
"""A group, and a rollout in it."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a host needs to start."""

    factories: Mapping[str, Component]
    """The environments by name, as `tora.config.environments.by_name` gives them; empty for tools alone."""
    tools: tuple[str, ...]
    rewards: tuple[Component, ...]
    memory_gib: float
    """How much the host may allocate."""
    objects: bytes | None = None
    """What `tora.config.components.registered` found in the program, pickled by value."""


@dataclass(frozen=True, slots=True)
class Raised:
    """What an environment raised."""

    reason: str
    """A clause with the environment as its subject: `raised ValueError: ...`."""
    traceback: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    content: Content
    error: Raised | None = None
    """What the tool raised, if it did; `content` then tells the policy."""
    turn_reward: float = 0.0
    """What the turn has earned, with the answer to its last call."""


class _Seat:
    """An environment and its thread; empty until the first reset."""

    def __init__(self, name: str) -> None:
        """`name`: the environment's."""
        self.name = name
        self.thread = ThreadPoolExecutor(1)
        self.environment: Any = None
        self.tools: dict[str, Callable[..., Any]] = {}


class Host:
    """Not thread-safe: one thread calls `submit`."""

    def __init__(self, setup: Setup, send: Callable[[int, Any], None]) -> None:
        """`send` takes a request's number and its answer, from any thread. Raises `ConfigError` if a component does not
        exist or the environment cannot be made."""
        self._setup, self._send = setup, send
        if setup.objects is not None:
            restore(cloudpickle.loads(setup.objects))
        self._functions = {function.__name__: function for function in map(locate, setup.tools)}
        self._rewarder = build_rewarder(setup.rewards)
        numbers = range(len(self._rewarder.rewards))
        self.scored_here = tuple(i for i in numbers if self._rewarder.takes_environments(i))
        self._seats: dict[Key, _Seat] = {}
        self._free: dict[str, list[_Seat]] = {name: [] for name in setup.factories or ("",)}
        self._scoring = ThreadPoolExecutor()
        self._probe()

    def _probe(self) -> None:
        """Make the first of each environment, so that one that cannot be made ends the run before it starts."""
        for name, free in self._free.items():
            seat = _Seat(name)
            try:
                self._make(seat)
            except ConfigError:
                raise
            except Exception as error:  # a user's code may raise anything
                path = self._setup.factories[name]["_component_"]
                raise ConfigError(f"{key_of(name)}={path} raised {type(error).__name__}: {error}") from error
            free.append(seat)

    def _make(self, seat: _Seat) -> None:
        if seat.name in self._setup.factories:
            seat.environment = instantiate(self._setup.factories[seat.name])
            seat.tools = {name: getattr(seat.environment, name) for name in tool_methods(type(seat.environment))}
        seat.tools |= self._functions

    def submit(self, number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        """Start one of the operations below; its answer is sent when it is ready."""
        if operation == "ping":
            self._send(number, None)
        elif operation == "close":
            self._close(*arguments)
        elif operation == "score":
            self._scoring.submit(self._answer, number, self._score, arguments)
        else:
            key, *rest = arguments
            if operation == "reset":
                name, *rest = rest
                free = self._free[name]
                self._seats[key] = free.pop() if free else _Seat(name)
            work = {"reset": self._reset, "call": self._call}[operation]
            self._seats[key].thread.submit(self._answer, number, work, (self._seats[key], *rest))

    def _answer(self, number: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            answer = work(*arguments)
        except BaseException as error:  # a user's code may raise anything, `SystemExit` too
            answer = _raised(error)
        self._send(number, answer)

    def _reset(self, seat: _Seat, row: Mapping[str, Any]) -> Content | None:
        if not seat.tools:
            self._make(seat)
        if seat.environment is None:
            return None  # tools alone
        if seat.name:
            row = {column: value for column, value in row.items() if column != COLUMN}
        observation = resolve(seat.environment.reset(**row))
        if observation is None or isinstance(observation, str):
            return text_content(observation) if observation else None
        shown = content_of(observation)
        if shown is None:
            kind = type(observation).__name__
            raise TypeError(f"reset returned a {kind}, expected a string, chat parts, an image or None")
        return shown

    def _call(self, seat: _Seat, calls: Sequence[ToolCall]) -> list[ToolResult]:
        results = [self._call_one(seat, call) for call in calls]
        ask = getattr(seat.environment, "get_turn_reward", None)
        if results and ask is not None:
            earned = resolve(ask())
            if not isinstance(earned, int | float) or not math.isfinite(earned):
                raise ValueError(f"get_turn_reward returned {earned!r}, expected a finite number")
            results[-1] = replace(results[-1], turn_reward=float(earned))
        return results

    def _call_one(self, seat: _Seat, call: ToolCall) -> ToolResult:
        if call.name not in seat.tools:
            return ToolResult(told(f"Tool {call.name} not found."), Raised("", ""))
        try:
            value = resolve(seat.tools[call.name](**call.arguments))
            return ToolResult(content_of(value) or text_content(str(value)))
        except Exception as error:  # a user's code may raise anything
            return ToolResult(told(message_of(error)), _raised(error))

    def _score(self, keys: Sequence[Key], prompt: Prompt, call: Call, limit_s: float) -> Column | Unanswered:
        environments = [self._seats[key].environment for key in keys]
        (answer,) = self._rewarder.columns(prompt, [replace(call, environments=environments)], limit_s)
        return answer

    def _close(self, keep: Sequence[Key], drop: Sequence[Key]) -> None:
        """The environments of `keep` may serve other rollouts; those of `drop` failed."""
        for key in keep:
            if seat := self._seats.pop(key, None):
                self._free[seat.name].append(seat)
        for key in drop:
            if seat := self._seats.pop(key, None):
                seat.thread.shutdown(wait=False)


def told(error: str) -> Content:
    """A tool's error as the policy sees it, in TRL's form."""
    return text_content(str({"error": error[:_LONGEST_ERROR]}))


def message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a user's exception may fail even here
        return "its message cannot be shown"


def _raised(error: BaseException) -> Raised:
    trace = "".join(traceback.format_exception(error))
    message = message_of(error)
    return Raised(f"raised {type(error).__name__}{message and ': '}{message}", trace)


def serve() -> None:
    """The main function of a host: works until its parent closes the connection or dies."""
    connection, timeout_s = Connection(int(sys.argv[2])), float(sys.argv[3])
    sending = threading.Lock()

    def send(number: int, answer: Any) -> None:
        with sending:
            say(connection, (number, answer))

    outlive_stops()
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        setup: Setup = connection.recv()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        asked = int(setup.memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (asked if hard == resource.RLIM_INFINITY else min(asked, hard), hard))
        host = Host(setup, send)
    except BaseException as error:  # a mistake in the config, or whatever a user's module raises, SystemExit too
        say(connection, portable(error))
        return
    say(connection, host.scored_here)
    # If an environment holds the interpreter lock forever and the parent is gone, only the kernel can end it.
    most_s, hard = int(timeout_s * (os.cpu_count() or 1)) + 2, resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        try:
            number, operation, arguments = connection.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)  # a thread may hang in an environment
        if hard == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + most_s, hard))
        host.submit(number, operation, arguments)
