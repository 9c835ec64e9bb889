"""Run the policy's Python code: the tool `python`, and the environment `Python` for other limits or a container.

A child process with limits on time, memory, file size and output, an empty environment, a folder of its own that is
deleted, and no network where the kernel lets a process give it up. This protects the run from mistakes. It is no
security boundary: the code may read what the run's user may read. For one, set `command` to a container runtime.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_LONGEST = 4000
"""Characters of output that the policy is shown."""
_FILE_BYTES = 64 * 2**20
_CODE = "code.py"
_LIMIT_AND_RUN = """
import ctypes, os, resource, sys
seconds, data, size = map(int, sys.argv[1:4])
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
try:
    ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
except (AttributeError, OSError):
    pass
for which, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_DATA, data), (resource.RLIMIT_FSIZE, size)):
    hard = resource.getrlimit(which)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))
os.execv(sys.executable, [sys.executable, "-I", sys.argv[4]])
"""
"""Sets the limits of the process that then runs the code: they outlast `execv`."""


class Python:
    """An environment whose only tool runs code. Nothing is kept from one call to the next."""

    def __init__(self, timeout_s: float = 10.0, memory_mib: int = 1024, command: Sequence[str] | None = None) -> None:
        """`timeout_s` must be shorter than `environment_timeout_s`.

        `command`: runs Python code from its standard input instead of a child with limits of ours, such as
        `[docker, run, --rm, -i, --network=none, --memory=1g, "python:3.12-slim", python, -]`.
        """
        self._timeout_s, self._memory_mib, self._command = timeout_s, memory_mib, command

    def reset(self, **row: Any) -> None:
        """Nothing to do."""

    def python(self, code: str) -> str:
        """
        Run Python code and read what it prints. Nothing is kept from one call to the next.

        Args:
            code: The code. Print what you want to see.
        """
        return run_code(code, timeout_s=self._timeout_s, memory_mib=self._memory_mib, command=self._command)


def python(code: str) -> str:
    """
    Run Python code and read what it prints. Nothing is kept from one call to the next.

    Args:
        code: The code. Print what you want to see.
    """
    return Python().python(code)


def run_code(code: str, *, timeout_s: float, memory_mib: int, command: Sequence[str] | None = None) -> str:
    """What the code prints, errors included; the middle of long output is left out.

    See `Python` for the arguments. Raises TimeoutError if it takes longer, and RuntimeError if it is killed.
    """
    with TemporaryDirectory(prefix="tora-python-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, _CODE)
        path.write_text(code, encoding="utf-8", errors="replace")
        limits = (str(int(timeout_s) + 1), str(memory_mib * 2**20), str(_FILE_BYTES))
        own = [sys.executable, "-I", "-c", _LIMIT_AND_RUN, *limits, _CODE]
        with path.open("rb") as source:
            child = subprocess.Popen(
                own if command is None else [*command],
                stdin=subprocess.DEVNULL if command is None else source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"HOME": folder, "PATH": os.defpath, "LANG": "C.UTF-8"} if command is None else None,
                start_new_session=True,
            )
        try:
            output = _read(child, time.monotonic() + timeout_s)
            if output is None:
                raise TimeoutError(f"the code took longer than {timeout_s:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # what the code has left running
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    if child.returncode < 0:
        raise RuntimeError(f"the code was ended by {signal.Signals(-child.returncode).name}")
    return output.decode("utf-8", "replace")


def _read(child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """The output of a child until it ends, at most about `_LONGEST` bytes; None if that takes too long."""
    assert child.stdout is not None
    first, last = b"", b""
    left_out = False
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not ready.select(left):
                break
            chunk = os.read(child.stdout.fileno(), 2**16)
            if not chunk:
                try:
                    child.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    break
                return first + (b"\n...\n" if left_out else b"") + last
            room = _LONGEST // 2 - len(first)
            first, rest = first + chunk[:room], chunk[room:]
            left_out |= len(last) + len(rest) > _LONGEST // 2
            last = (last + rest)[-(_LONGEST // 2) :]
    return None
