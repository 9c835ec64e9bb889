"""A small process beside a run that removes what the run leaves, however it ends: processes, shared memory, scratch.

    python sweeper.py DRIVER MARK SCRATCH

It starts with the run and waits until its standard input closes, which the kernel does even after `kill -9`, or says
`end`; a line `delete PATH` adds a path. It runs as a script, with the standard library alone.

A process belongs to the run if it descends from the driver, has the run's mark in its environment, or has the scratch
folder on its command line or as the place of its output; so do its descendants. Ray's workers overwrite their
environment, and their parents may be gone, so no single sign is enough.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "TORA_RUN_MARK"
"""Environment variable that all processes of a run inherit."""
_LIMIT_S = 10.0
"""How long to go on killing processes that appear."""
_TRACKER_S = 3.0
"""What Python's resource trackers get, once the driver is gone, to unlink the shared memory of dead processes."""


def main() -> None:
    # `ray job stop`, Slurm and systemd signal all processes of a job, and the run may still need seconds to end
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    driver, mark, scratch = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    lines = _wait(driver)
    paths = [scratch, *(line.removeprefix("delete ") for line in lines if line.startswith("delete "))]
    memory = _shared_memory([driver])
    began = time.monotonic()
    deadline = began + _LIMIT_S
    patience = began + (0 if "end" in lines else _TRACKER_S)  # a driver that says so lives, and its trackers with it
    while (found := _processes(driver, mark, scratch)) and time.monotonic() < deadline:
        memory |= _shared_memory(found)
        others = [
            pid for pid in found if b"multiprocessing.resource_tracker" not in _read(Path(f"/proc/{pid}/cmdline"))
        ]
        for pid in found if time.monotonic() > patience else others:
            _kill(pid)
        time.sleep(0.02)
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    if memory:
        kept = _shared_memory([pid for pid in _parents() if pid != driver])
        for file in memory - kept:
            Path(file).unlink(missing_ok=True)


def _wait(driver: int) -> list[str]:
    """What the driver said, once the run is over."""
    received = b""
    while os.getppid() == driver:
        if not select.select([0], [], [], 1.0)[0]:
            continue
        part = os.read(0, 1 << 16)
        received += part
        if not part or received.endswith(b"end\n"):
            break
    return received.decode(errors="replace").splitlines()


def _processes(driver: int, mark: str, scratch: str) -> list[int]:
    """Live processes of the run, without the driver and this one."""
    parents = _parents()
    ours = {driver} | {pid for pid in parents if _is_marked(pid, mark, scratch)}
    before = 0
    while len(ours) > before:
        before = len(ours)
        ours |= {pid for pid, parent in parents.items() if parent in ours}
    return sorted(ours & parents.keys() - {driver, os.getpid()})


def _parents() -> dict[int, int]:
    """The parent of every live process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _read(entry / "stat").rpartition(b")")[2].split()
            if fields and fields[0] not in (b"Z", b"X"):
                parents[int(entry.name)] = int(fields[1])
    return parents


def _is_marked(pid: int, mark: str, scratch: str) -> bool:
    folder = Path(f"/proc/{pid}")
    if f"{MARK}={mark}".encode() in _read(folder / "environ").split(b"\0"):
        return True
    if scratch.encode() in _read(folder / "cmdline"):
        return True
    try:
        return os.readlink(folder / "fd" / "1").startswith(scratch)
    except OSError:
        return False


def _shared_memory(pids: list[int]) -> set[str]:
    """Files below /dev/shm that these processes have mapped."""
    words = [word for pid in pids for word in _read(Path(f"/proc/{pid}/maps")).split()]
    return {word.decode(errors="replace") for word in words if word.startswith(b"/dev/shm/")}


def _read(file: Path) -> bytes:
    """Empty if the process is gone or another user's."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _kill(pid: int) -> None:
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
