"""A function in another Python interpreter, with packages that cannot be installed beside Tora's.

The interpreter needs nothing of Tora's. Arguments and answers are JSON. See `elsewhere_main` for its side.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from tora.errors import ConfigError
from tora.rewards.processes import START_S

_MAIN = str(Path(__file__).with_name("elsewhere_main.py"))
_RUN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""A script's own folder would come first in its path for imports, and ours has a `python.py`."""
_WATCH = 'read _; sleep 6; kill -9 "-$0"'
"""Ends the group `$0` when this process has ended, even if code there holds its interpreter lock forever."""


_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Environment variables that speak of this interpreter."""


class RemoteError(Exception):
    """What the function raised there, or the end of its interpreter."""


class Elsewhere:
    """Calls one function there, from many threads at once. An interpreter that has ended is started again."""

    def __init__(self, python: str, path: str) -> None:
        """`python`: the interpreter. `path`: dotted path of the function, sync or async; modules in the working
        directory and in the config's folder count.

        Raises ConfigError if there is no such interpreter or function.
        """
        found = shutil.which(Path(python).expanduser())
        if found is None:
            raise ConfigError(f"{python} is no Python interpreter: there is no such program.")
        self._python, self._path = str(Path(found).absolute()), path
        self._lock = threading.Lock()
        self._child = self._start()

    def __call__(self, **arguments: Any) -> Any:
        """Raises RemoteError if the function raises or its interpreter ends, TypeError if an argument is not JSON."""
        return self._ask(arguments).result()

    async def answer(self, **arguments: Any) -> Any:
        """As a call, without holding up the event loop."""
        return await asyncio.wrap_future(self._ask(arguments))

    def _ask(self, arguments: Mapping[str, Any]) -> Future[Any]:
        with self._lock:
            if self._child.ended:
                self._child = self._start()
            return self._child.ask(arguments)

    def close(self) -> None:
        self._child.close()

    def _start(self) -> _Interpreter:
        try:
            return _Interpreter(self._python, self._path)
        except (OSError, RemoteError) as error:
            raise ConfigError(f"{self._path} cannot be called in {self._python}: {error}") from error


shared = functools.cache(Elsewhere)
"""One interpreter for all environments of a process."""


def _own_folders() -> list[str]:
    """Where this process looks for modules, beside what is installed."""
    installed = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)}
    return [
        folder
        for folder in sys.path
        if folder and not any(Path(folder).resolve().is_relative_to(prefix) for prefix in installed)
    ]


def _file_of(path: str) -> str | None:
    """The file of one of our own modules, which the other interpreter cannot import by name."""
    module = path.rpartition(".")[0]
    if module.partition(".")[0] != "tora":
        return None
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{module} does not exist.")
    return spec.origin


class _Interpreter:
    def __init__(self, python: str, path: str) -> None:
        file = _file_of(path)
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name not in _OURS}
        programs = str(Path(python).parent)  # as if its virtual environment were activated
        environment["PATH"] = os.pathsep.join((programs, environment.get("PATH", os.defpath)))
        with theirs:
            descriptor = theirs.fileno()
            self._process = subprocess.Popen(
                [python, "-c", _RUN, _MAIN, str(descriptor), json.dumps(_own_folders())],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,
            )
        self._socket, self._lines = ours, ours.makefile("r", encoding="utf-8")
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=self._process.pid,
        )
        self._sending, self._state = threading.Lock(), threading.Lock()
        self._pending: dict[int, Future[Any]] = {}
        self._numbers = count()
        self.ended = False
        ours.settimeout(START_S)
        try:
            self._send({"path": path, "file": file})
            answer = json.loads(self._lines.readline() or "null")
        except OSError as error:
            self.close()
            raise RemoteError(f"it did not start: {error}") from error
        if answer is None or "error" in answer:
            self.close()
            raise RemoteError("it ended at once" if answer is None else answer["error"])
        ours.settimeout(None)
        threading.Thread(target=self._read, name="elsewhere", daemon=True).start()

    def ask(self, arguments: Mapping[str, Any]) -> Future[Any]:
        """Raises TypeError if an argument is not JSON."""
        future: Future[Any] = Future()
        number = next(self._numbers)
        line = {"id": number, "arguments": dict(arguments)}
        with self._state:
            if self.ended:
                future.set_exception(RemoteError("its interpreter has ended"))
                return future
            self._pending[number] = future
        try:
            self._send(line)
        except TypeError:
            self._pending.pop(number)
            raise
        except OSError:
            self._lose()
        return future

    def _send(self, message: Mapping[str, Any]) -> None:
        line = f"{json.dumps(message)}\n".encode()
        with self._sending:
            self._socket.sendall(line)

    def _read(self) -> None:
        try:
            for line in self._lines:
                answer = json.loads(line)
                future = self._pending.pop(answer["id"])
                if "error" in answer:
                    error = RemoteError(answer["error"])
                    error.add_note(f"In the other interpreter:\n{answer['traceback']}")
                    future.set_exception(error)
                else:
                    future.set_result(answer["value"])
        except OSError:
            pass
        self._lose()

    def _lose(self) -> None:
        with self._state:
            self.ended, pending = True, [*self._pending.values()]
            self._pending.clear()
        self.close()
        for future in pending:
            future.set_exception(RemoteError("its interpreter has ended"))

    def close(self) -> None:
        """The other side ends itself, and the watch ends it if it does not."""
        self.ended = True
        with suppress(OSError):  # the other side may be gone
            self._socket.shutdown(socket.SHUT_RDWR)
        assert self._watch.stdin is not None
        self._watch.stdin.close()
        threading.Thread(target=self._reap, daemon=True).start()

    def _reap(self) -> None:
        self._process.wait()
        self._watch.wait()
        self._lines.close()
        self._socket.close()
