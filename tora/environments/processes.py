"""Environments in child processes, with a time limit per answer.

A process holds the environments of several groups. An environment that does not answer in time costs its own rollout:
its process takes no new groups and ends with those that it has. A process that is dead, or that answers nothing at all
because one environment holds its interpreter lock, costs the rollouts that it holds. Another takes its place.
"""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cloudpickle

from tora.config.environments import by_name
from tora.config.schema import Component
from tora.environments.host import Key, Raised, Setup, ToolResult
from tora.environments.tools import ToolCall
from tora.errors import ConfigError, RolloutError
from tora.rewards.processes import START_S, again, spawn
from tora.rewards.rewarder import Call, Column, Unanswered, setting_by_name, took_longer
from tora.types import FailedReward, Prompt

_log = logging.getLogger(__name__)
_CANCEL_S = 2.0
"""Seconds that an async reward function may take to end once its limit has cancelled it."""
_PING_S = 2.0
"""A process that does not answer a ping within this time is taken to be stuck as a whole."""

_FULL = 0.75
"""Share of a process's memory limit above which it takes no new groups."""


class _Lost(Exception):
    """The process has ended."""


class EnvironmentProcesses:
    """The processes of one rollout worker. Thread-safe."""

    def __init__(
        self,
        factory: Component | None,
        tools: Sequence[str],
        rewards: Sequence[Component],
        *,
        timeout_s: float,
        reward_timeout_s: float,
        num_processes: int,
        memory_gib: float = 8.0,
        objects: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Starts one process; more are started, up to `num_processes`, while all hold groups. `factory` and
        `memory_gib`: see `RunConfig.environment_factory` and `environment_memory_gib`. `objects`: those of a program
        that components name, see `tora.config.components.registered`.

        Raises `ConfigError` if a component does not exist or the environment cannot be made, what a module raises when
        it is imported, and `RolloutError` if the process does not start.
        """
        self._setup = Setup(by_name(factory), tuple(tools), tuple(rewards), memory_gib, _by_value(objects))
        timeout_scores = setting_by_name(rewards, "timeout_score", 0.0)
        self.reward_names, self.timeout_scores = [*timeout_scores], [*timeout_scores.values()]
        self.timeout_s, self.reward_timeout_s, self._num_processes = timeout_s, reward_timeout_s, num_processes
        self._lock = threading.Lock()
        self._numbers = count()
        self._shown: set[tuple[str, str]] = set()
        self._all = [_Process(self._setup, timeout_s)]
        self.scored_here = self._all[0].scored_here
        """Numbers of the rewards whose functions take `environments`. Only `Session.column` can call those."""

    def open(self, size: int, environment: str = "") -> Session:
        """The environments of a group of `size` rollouts. `environment`: its name, if there are several. Raises
        `RolloutError` if a new process does not start."""
        with self._lock:
            self._all = [process for process in self._all if not process.ended]
            for process in self._all:
                self._retire_if_full(process)
            usable = [process for process in self._all if not process.retired]
            least = min(usable, key=lambda process: process.num_sessions, default=None)
            if least is None or (least.num_sessions and len(usable) < self._num_processes):
                least = again(partial(_Process, self._setup, self.timeout_s))
                self._all.append(least)
            least.num_sessions += 1
            return Session(self, least, [(next(self._numbers), index) for index in range(size)], environment)

    def _retire_if_full(self, process: _Process) -> None:
        """Memory that an environment has leaked comes back only with its process."""
        if process.retired or process.gib < _FULL * self._setup.memory_gib:
            return
        _log.warning(
            "a process of environments holds %.1f GiB and is replaced; environment_memory_gib=%g sets how much it may "
            "hold",
            process.gib,
            self._setup.memory_gib,
        )
        process.retired = True
        if process.num_sessions == 0:
            process.kill()

    def show(self, where: str, raised: Raised) -> None:
        """Log a traceback, once for each place and kind of error."""
        kind = (where, raised.reason.partition(":")[0])
        with self._lock:
            known = kind in self._shown or not raised.traceback
            self._shown.add(kind)
        if not known:
            told = "%s of an environment %s; further errors of this kind are only counted\n%s"
            _log.warning(told, where, raised.reason, raised.traceback)

    def release(self, process: _Process) -> None:
        with self._lock:
            process.num_sessions -= 1
            if process.retired and process.num_sessions == 0:
                process.kill()

    def close(self) -> None:
        with self._lock:
            for process in self._all:
                process.kill()


class Session:
    """The environments of one group's rollouts. Close it when the group is scored."""

    def __init__(
        self, processes: EnvironmentProcesses, process: _Process, keys: Sequence[Key], environment: str
    ) -> None:
        self._processes, self._process, self._keys = processes, process, keys
        self.environment = environment
        """Its name; "" if there is only one."""
        self._failed: set[int] = set()

    def reset(self, index: int, row: Mapping[str, Any]) -> Future[Any]:
        """Begin an episode of rollout `index`; `settle` gives the observation, a `Content` or None."""
        return self._process.ask("reset", self._keys[index], self.environment, row)

    def call(self, index: int, calls: Sequence[ToolCall]) -> Future[Any]:
        """Call tools in order; `settle` gives a list of `ToolResult`."""
        return self._process.ask("call", self._keys[index], [*calls])

    def settle(self, index: int, where: str, future: Future[Any], since: float) -> Any:
        """The answer, or a `FailedReward`. `since`: when the question was asked, by `time.monotonic`."""
        answer = self._wait(future, since + self._processes.timeout_s, self._processes.timeout_s)
        if isinstance(answer, Raised):
            self._processes.show(where, answer)
        if isinstance(answer, Raised | Unanswered):
            answer = FailedReward("environment", answer.reason)
        if isinstance(answer, FailedReward):
            self._failed.add(index)
        elif isinstance(answer, list):
            for result in answer:
                if isinstance(result, ToolResult) and result.error is not None:
                    self._processes.show(where, result.error)
        return answer

    def column(
        self,
        number: int,
        prompt: Prompt,
        indices: Sequence[int],
        completions: Sequence[Any],
        token_ids: Sequence[list[int]],
    ) -> Column:
        """The scores that reward `number` gives the rollouts `indices`. A call that fails as a whole is repeated for
        each rollout alone, as `RewardProcesses` does."""
        whole = self._ask_column(number, prompt, indices, completions, token_ids)
        if len(indices) == 1 or not all(isinstance(score, FailedReward) for score in whole):
            return whole
        each = zip(indices, completions, token_ids, strict=True)
        return [self._ask_column(number, prompt, [i], [c], [ids])[0] for i, c, ids in each]

    def _ask_column(self, number: int, prompt: Prompt, indices: Sequence[int], *scored: Any) -> Column:
        name, limit_s = self._processes.reward_names[number], self._processes.reward_timeout_s
        keys, call = [self._keys[index] for index in indices], Call(number, *scored)
        future = self._process.ask("score", keys, replace(prompt, images=()), call, limit_s)
        answer = self._wait(future, time.monotonic() + limit_s + _CANCEL_S, limit_s)
        if isinstance(answer, Raised):
            answer = Unanswered(answer.reason, is_timeout=False)
        if not isinstance(answer, Unanswered):
            return answer
        parts = {name: self._processes.timeout_scores[number]} if answer.is_timeout and len(indices) == 1 else None
        return [FailedReward(name, answer.reason, parts)] * len(indices)

    def close(self) -> None:
        keys = dict(enumerate(self._keys))
        drop = [keys.pop(index) for index in self._failed]
        self._process.ask("close", [*keys.values()], drop)
        self._processes.release(self._process)

    def _wait(self, future: Future[Any], deadline: float, limit_s: float) -> Any:
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            self._process.retire()
            return Unanswered(took_longer(limit_s), is_timeout=True)
        except _Lost:
            return Unanswered("ended its process", is_timeout=False)


def _by_value(objects: Mapping[str, Any]) -> bytes | None:
    """Raises ConfigError if they hold what no other process can have."""
    if not objects:
        return None
    try:
        return cloudpickle.dumps(dict(objects))
    except Exception as error:  # whatever the objects refer to
        names = ", ".join(path.rpartition(".")[2] for path in objects)
        raise ConfigError(
            f"{names} cannot be sent to the processes of environments, which raised {type(error).__name__}: {error}; "
            "what is defined in a module of its own need not be sent"
        ) from error


class _Process:
    """A child that runs `host.serve`."""

    def __init__(self, setup: Setup, timeout_s: float) -> None:
        self._process, self._connection = spawn("tora.environments.host", timeout_s)
        self.num_sessions = 0
        self.retired = False
        self._pending: dict[int, Future[Any]] = {}
        self._numbers = count()
        self._sending, self._state = threading.Lock(), threading.Lock()
        self._is_lost = False
        try:
            self._connection.send(setup)
            if not self._connection.poll(START_S):
                raise RolloutError(f"a process for environments did not start within {START_S:g} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self.kill()
            raise RolloutError("a process for environments ended while it started") from error
        except RolloutError:
            self.kill()
            raise
        if isinstance(answer, Exception):
            self.kill()
            raise answer
        self.scored_here: tuple[int, ...] = answer
        threading.Thread(target=self._read, name="environment-answers", daemon=True).start()

    @property
    def ended(self) -> bool:
        return self._is_lost

    @property
    def gib(self) -> float:
        """Memory that the process holds."""
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0  # it has ended
        return pages * resource.getpagesize() / 2**30

    def ask(self, operation: str, *arguments: Any) -> Future[Any]:
        """The future raises `_Lost` if the process ends first. `close` has no answer."""
        future: Future[Any] = Future()
        number = next(self._numbers)
        with self._state:
            if self._is_lost:
                future.set_exception(_Lost())
                return future
            if operation != "close":
                self._pending[number] = future
        try:
            with self._sending:
                self._connection.send((number, operation, arguments))
        except OSError:  # it has ended, or is stopped and has left a part of the question unread
            self.kill()
            self._lose()
        return future

    def retire(self) -> None:
        """Take no new groups; end at once if the process answers nothing."""
        self.retired = True
        if not self._answers():
            self.kill()

    def _answers(self) -> bool:
        if not self._sending.acquire(timeout=_PING_S):
            return False  # a question has filled the pipe, and the process does not read
        self._sending.release()
        try:
            self.ask("ping").result(_PING_S)
        except (FutureTimeout, _Lost):
            return False
        return True

    def kill(self) -> None:
        self.retired = True
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        try:
            while True:
                number, answer = self._connection.recv()
                with self._state:
                    future = self._pending.pop(number)
                future.set_result(answer)
        except (EOFError, OSError):
            self._lose()
            self._connection.close()

    def _lose(self) -> None:
        with self._state:
            self._is_lost, pending = True, [*self._pending.values()]
            self._pending.clear()
        for future in pending:
            future.set_exception(_Lost())
