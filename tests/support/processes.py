"""A run of the quick-start in a process group of its own, for tests that send it signals."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

_OVERRIDES = ["batch_size=4", "grpo_samples=4", "dtype=fp32"]
_KEPT = "torchinductor_"
"""Prefix of the folder of compiled kernels, which later runs use."""


@contextmanager
def tora_run(
    folder: Path, *overrides: str, evaluates: bool = False, config: str = "quickstart"
) -> Iterator[subprocess.Popen[bytes]]:
    """`tora run CONFIG` as a terminal would start it; its output goes to `folder` with the suffix `.log`.

    Unless it `evaluates`, each row of its metrics is a training step. Ends the run if it is still going. Raises
    AssertionError if it leaves processes, shared memory or temporary files, or a traceback in its output.
    """
    words = [*_OVERRIDES, *(() if evaluates else ("eval=null",)), f"output_dir={folder}", *overrides]
    scratch = tempfile.mkdtemp(dir="/tmp")  # short: Ray puts sockets below it, and their paths are limited
    before, output = set(os.listdir("/dev/shm")), folder.parent / f"{folder.name}.log"
    with output.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tora", "run", config, *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TMPDIR": scratch},
        )
        try:
            yield child
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait(60)
            child.wait()
            processes, files, memory = left_behind(scratch, before)
            shutil.rmtree(scratch, ignore_errors=True)
        assert not processes and not files and not memory, (processes, files, memory)
        assert "Traceback" not in output.read_text(errors="replace")


def output(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text()


def descendants(pid: int) -> list[int]:
    """Descendants of a process. Ray's processes have separate sessions, so parents are followed instead."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if stat[0] != "Z":
                parents[int(entry.name)] = int(stat[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def actors(pid: int, name: str) -> list[int]:
    """Processes of a Ray actor class: named `ray::CLASS`, and `ray::CLASS.METHOD` while a method runs."""
    return [child for child in descendants(pid) if command_line(child).startswith(f"ray::{name}".encode())]


def children(pid: int, module: str) -> list[int]:
    """Descendants that run `module.serve()`: processes of reward functions or of environments."""
    return [child for child in descendants(pid) if f"{module}.serve()".encode() in command_line(child)]


def listening(pids: list[int]) -> set[int]:
    """TCP ports that the processes listen on. Raises AssertionError if another machine could reach one."""
    listeners = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            connections = psutil.Process(pid).net_connections("tcp")
            listeners += [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listeners} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listeners
    return {address.port for address in listeners}


def command_line(pid: int) -> bytes:
    """Empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def left_behind(scratch: str, memory: set[str], within_s: float = 10.0) -> tuple[list[str], list[str], set[str]]:
    """Processes that still use the scratch folder, its files, and files of /dev/shm that were not among `memory`. Waits
    for all of them to go."""
    deadline = time.monotonic() + within_s
    while True:
        users = [process for process in psutil.process_iter() if uses(process, scratch)]
        left = [process.name() for process in users if process.is_running()]
        files = [name for name in os.listdir(scratch) if not name.startswith(_KEPT)]
        shared = {name for name in os.listdir("/dev/shm") if name not in memory and was_made_by_a_run(name)}
        if not (left or files or shared) or time.monotonic() > deadline:
            return left, files, shared
        time.sleep(0.1)


def was_made_by_a_run(shared: str) -> bool:
    """Whether a file of /dev/shm is one that torch, vLLM or multiprocessing makes, and no living process holds it."""
    for process in psutil.process_iter():
        with suppress(OSError):
            if shared in Path(f"/proc/{process.pid}/maps").read_text():
                return False
    return True


def uses(process: psutil.Process, folder: str) -> bool:
    """Whether its temporary files or its output lie in a folder, which holds for all processes of a run."""
    with suppress(psutil.Error, OSError):
        if process.environ().get("TMPDIR", "").startswith(folder):
            return process.status() != psutil.STATUS_ZOMBIE
        return folder in " ".join(process.cmdline()) or os.readlink(f"/proc/{process.pid}/fd/1").startswith(folder)
    return False


def wait_until_it_listens(run: subprocess.Popen[Any]) -> None:
    """Python itself takes some hundredths of a second before its first line runs."""
    bit = 1 << (signal.SIGTERM - 1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{run.pid}/status").read_text(), re.MULTILINE)
        if caught is not None and int(caught[1], 16) & bit:
            return
        time.sleep(0.005)
    raise AssertionError("it does not listen")


def wait_for(holds: Callable[[], Any], child: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Returns once `holds()` does; raises AssertionError if the run ends first or time is up."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert child.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
