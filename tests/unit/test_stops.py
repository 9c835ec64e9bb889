"""Signals to a process, and what it leaves. Each test runs a small program of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import wait_until_it_listens

_LISTEN = "from tora.launch.signals import Stop; stop = Stop(); stop.listen(); "
_READY = "print('ready', flush=True); "
_IN_C = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
"""Minutes in C code, during which no Python handler of a signal runs."""


def program(code: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **variables},
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_acknowledged_and_the_second_ends_the_process(number: signal.Signals) -> None:
    with program(f"{_LISTEN} stop.let_save(True); {_READY} {_IN_C}") as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        began = time.monotonic()
        child.send_signal(number)
        assert child.stderr.readline() + child.stderr.readline() == "\nstopping after this step; again to end now\n"
        assert child.poll() is None
        child.send_signal(number)
        assert child.wait() == 130 and time.monotonic() - began < 3
        assert child.stderr.read() == "\nending now\n"


def test_a_signal_before_there_is_anything_to_save_ends_the_process() -> None:
    with program(f"{_LISTEN} stop.at_end(lambda: print('left', file=open(2, 'w'))); {_READY} {_IN_C}") as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(3) == 130 and child.stderr.read() == "\nstopping now\n"


def test_a_stop_at_the_last_moment_is_an_exit_code_of_130() -> None:
    with program(f"{_LISTEN} stop.let_save(True); {_READY} import time; time.sleep(1); stop.exit(0)") as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 130
    with program("from tora.launch.signals import Stop; Stop().exit(3)") as child:
        assert child.wait(5) == 3


def test_a_script_installed_before_the_program_listened_runs_one_that_does(tmp_path: Path) -> None:
    words = ["tora", "run", "quickstart", "async_rl=false", f"output_dir={tmp_path}/run"]
    with program(f"import sys; sys.argv = {words}; from tora.cli import main; sys.exit(main())") as child:
        wait_until_it_listens(child)
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        assert child.stderr is not None and child.stderr.read() == "\nstopping now\n"
        assert child.wait(5) == 130
    assert not (tmp_path / "run").exists()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """The scratch folder of a run whose TMPDIR is long lies in /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


_LEAVES = """
import subprocess, sys, tempfile, time
from multiprocessing import shared_memory
from tora.launch.leftovers import Leftovers
leftovers = Leftovers()
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=True)]
code = "import subprocess, time; print(subprocess.Popen(['sleep', '99']).pid, flush=True); time.sleep(99)"
children.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={"TMPDIR": "/"}))
memory = shared_memory.SharedMemory(create=True, size=8)
grandchild = children[1].stdout.readline().decode().strip()
print(tempfile.mkdtemp(), memory.name, *(child.pid for child in children), grandchild, flush=True)
"""


@pytest.mark.parametrize("how", ["kill -9", "exit"])
def test_nothing_is_left_of_a_run(how: str, short_path: Path) -> None:
    last = "leftovers.remove(10)" if how == "exit" else "time.sleep(99)"
    with program(_LEAVES + last, TMPDIR=str(short_path)) as child:
        assert child.stdout is not None
        scratch, memory, *pids = child.stdout.readline().split()
        assert Path(scratch).is_relative_to(short_path) and Path(f"/dev/shm/{memory}").exists()
        if how == "kill -9":
            child.kill()
            # processes that no longer descend from the driver are found by their mark
            pids = [pids[0]]
        child.wait()
    deadline = time.monotonic() + 10
    while (
        [*short_path.glob("tora-*")]
        or Path(f"/dev/shm/{memory}").exists()
        or any(psutil.pid_exists(int(pid)) and is_alive(int(pid)) for pid in pids)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_to_every_process_of_a_run_leaves_the_sweeper_at_work(short_path: Path) -> None:
    """As Slurm, systemd and `ray job stop` send it."""
    code = f"{_LISTEN} from tora.launch.leftovers import Leftovers; stop.let_save(True); stop.leftovers = Leftovers(); "
    with program(f"{code} {_READY} import time; time.sleep(60)", TMPDIR=str(short_path)) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        (sweeper,) = psutil.Process(child.pid).children()
        while "sweeper" not in sweeper.cmdline()[-4]:
            time.sleep(0.01)
        time.sleep(0.2)  # it has no way to say that it listens
        for process in (sweeper, child):
            process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert is_alive(sweeper.pid)
        child.kill()
    sweeper.wait(10)
    assert not [*short_path.glob("tora-*")]


def is_alive(pid: int) -> bool:
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
