"""The other side of `tora.environments.elsewhere`: calls one function, in an interpreter that has nothing of Tora's.

    python elsewhere_main.py DESCRIPTOR FOLDERS

The descriptor is a socket that carries JSON, a line each. First `{"path", "file"}` says which function; then each
`{"id", "arguments"}` is answered with `{"id", "value"}` or `{"id", "error", "traceback"}`, as soon as it is ready.
Ends when the socket does, with all processes that the function has started.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

_MOST_AT_ONCE = 1024
_END_S = 5.0
"""Seconds in which functions and their contexts may end once the other side has."""


def _locate(path, file):
    """The function at a dotted path; `file`: of its module, if that is not to be found by name."""
    module, _, name = path.rpartition(".")
    if file is None:
        found = importlib.import_module(module)
    else:
        spec = importlib.util.spec_from_file_location(module.replace(".", "_"), file)
        assert spec is not None and spec.loader is not None, f"{file} is no module"
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
    function = getattr(found, name)
    if not callable(function):
        raise TypeError(f"{path} cannot be called")
    return function


def _said(error):
    return {
        "error": f"{type(error).__name__}: {error}".rstrip(": "),
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }


class _Server:
    def __init__(self, connection, function):
        self._connection, self._function = connection, function
        self._sending = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(_MOST_AT_ONCE))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        try:
            self._loop.run_forever()
        except BaseException:  # `SystemExit` in a task that a function has started
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)

    def send(self, message):
        try:
            line = json.dumps(message)
        except (TypeError, ValueError) as error:
            line = json.dumps({"id": message["id"], **_said(error)})
        with self._sending:
            self._connection.sendall(f"{line}\n".encode())

    def serve(self, lines):
        for line in lines:
            asyncio.run_coroutine_threadsafe(self._answer(**json.loads(line)), self._loop)

    async def _answer(self, id, arguments):
        try:
            if inspect.iscoroutinefunction(self._function):
                value = await self._function(**arguments)
            else:
                value = await self._loop.run_in_executor(None, lambda: self._function(**arguments))
                value = await value if inspect.isawaitable(value) else value
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a user's code may raise anything, `SystemExit` too
            self.send({"id": id, **_said(error)})
        else:
            self.send({"id": id, "value": value})

    def close(self):
        async def end():
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_END_S / 2)

        with contextlib.suppress(FutureTimeout):  # a function holds up the loop
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(_END_S / 2 + 1)


def _end_group():
    if os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)


def main():
    descriptor, folders = int(sys.argv[1]), json.loads(sys.argv[2])
    sys.path[:] = [*(folder for folder in sys.path if folder), os.getcwd(), *folders]
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))  # the parent's counts its own time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's affair
    atexit.register(_end_group)  # the first to be registered is the last to be called
    connection = socket.socket(fileno=descriptor)
    lines = connection.makefile("r", encoding="utf-8")
    try:
        function = _locate(**json.loads(lines.readline()))
    except BaseException as error:  # a user's module may raise anything
        with contextlib.suppress(OSError):  # the parent is gone
            connection.sendall(f"{json.dumps(_said(error))}\n".encode())
        return
    server = _Server(connection, function)
    with contextlib.suppress(OSError):
        connection.sendall(b"{}\n")
    server.serve(lines)
    last = threading.Timer(_END_S, _end_group)
    last.daemon = True
    last.start()
    server.close()


if __name__ == "__main__":
    main()
