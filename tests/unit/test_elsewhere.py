"""A function in another interpreter: a virtual environment of its own, in which nothing is installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tora.config.load import load_config
from tora.environments.elsewhere import Elsewhere, RemoteError
from tora.environments.program import Program
from tora.errors import ConfigError

MODULE = '''
import asyncio, os, re, signal, subprocess, sys, threading, time

def act(how="", **arguments):
    print("printed")
    if how == "raise": raise ValueError("bad")
    if how == "sys.exit": raise SystemExit(3)
    if how == "exit": os._exit(3)
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang": time.sleep(3600)
    if how == "lock": re.match("(a+)+$", "a" * 60 + "b")
    if how == "object": return object()
    if how == "child": return subprocess.Popen(["sleep", "3600"]).pid
    if how == "where": return [sys.prefix, "numpy" in sys.modules, os.getpid(), os.getpgid(0)]
    return arguments

async def both(barrier, **arguments):
    """Returns once it is called twice at the same time."""
    global seen
    seen = globals().get("seen", 0) + 1
    while seen < 2:
        await asyncio.sleep(0.01)
    return barrier

def later(**arguments):
    async def answer():
        return "awaited"
    return answer()

async def loop_exit(**arguments):
    async def leave():
        raise SystemExit(4)
    asyncio.create_task(leave())
    await asyncio.sleep(3600)

async def hold(**arguments):
    time.sleep(3600)

value = 3
'''


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("other")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin/python")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "there.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def there(python: str, module: Path) -> Any:
    made = Elsewhere(python, "there.act")
    yield made
    made.close()


def gone(pid: int, limit_s: float = 15.0) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_it_is_another_interpreter(there: Elsewhere, python: str) -> None:
    prefix, has_numpy, pid, group = there(how="where")
    assert prefix == str(Path(python).parent.parent) != sys.prefix and not has_numpy
    assert pid == group != os.getpgid(0), "its processes are a group of their own"
    row = {"text": "ü\n😀", "number": 1.5, "none": None, "list": [1, {"a": "b"}], "big": "x" * 300_000}
    assert there(**row) == row


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "ValueError: bad"),
        ("sys.exit", "SystemExit: 3"),
        ("object", "TypeError: Object of type object is not JSON"),
        ("exit", "its interpreter has ended"),
        ("kill", "its interpreter has ended"),
    ],
)
def test_what_fails_there_is_said_and_the_next_call_answers(there: Elsewhere, how: str, said: str) -> None:
    with pytest.raises(RemoteError, match=said) as error:
        there(how=how)
    assert how != "raise" or "there.py" in error.value.__notes__[0]
    assert there(a=1) == {"a": 1}


def test_an_argument_that_is_no_json_is_refused(there: Elsewhere) -> None:
    with pytest.raises(TypeError, match="not JSON"):
        there(picture=b"x")
    assert there(a=1) == {"a": 1}


def test_calls_run_at_once(python: str, module: Path) -> None:
    two, answers = Elsewhere(python, "there.both"), []
    threads = [threading.Thread(target=lambda n=n: answers.append(two(barrier=n))) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    two.close()
    assert sorted(answers) == [1, 2]
    made = Elsewhere(python, "there.later")
    assert made() == "awaited"
    made.close()


def test_a_task_that_exits_ends_the_call_and_not_the_next(python: str, module: Path) -> None:
    made = Elsewhere(python, "there.loop_exit")
    for _ in range(2):
        with pytest.raises(RemoteError, match="has ended"):
            made()
    made.close()


@pytest.mark.parametrize(
    "how",
    ["child", *(pytest.param(how, marks=pytest.mark.slow) for how in ("hang", "lock"))],  # seconds of grace
)
def test_nothing_is_left_of_it(python: str, module: Path, how: str) -> None:
    """Neither when it is closed, nor when the process that called it is killed."""
    code = (
        "import threading, time\nfrom tora.environments.elsewhere import Elsewhere\n"
        f"there = Elsewhere({python!r}, 'there.act')\npids = [there(how='where')[2]]\n"
        f"call = threading.Thread(target=lambda: pids.append(there(how={how!r})), daemon=True)\ncall.start()\n"
        f"call.join({5 if how == 'child' else 0.3})\nprint(*pids, flush=True)\ntime.sleep(60)\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as caller:
        assert caller.stdout is not None
        line = next(line for line in iter(caller.stdout.readline, "") if line[0].isdigit())
        pids = [int(pid) for pid in line.split()]
        assert len(pids) == (2 if how == "child" else 1)
        caller.send_signal(signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow  # seconds of grace
def test_a_function_that_holds_up_its_event_loop_ends_without_a_traceback(
    python: str, module: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Elsewhere(python, "there.hold")
    call = threading.Thread(target=made, daemon=True)
    call.start()
    call.join(1)
    made.close()
    time.sleep(8)
    assert "elsewhere_main" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("there.none", "has no attribute 'none'"),
        ("there.value", "cannot be called"),
        ("nowhere.act", "No module named 'nowhere'"),
        ("broken.act", "ZeroDivisionError"),
        ("leaves.act", "SystemExit: 5"),
        ("dies.act", "it ended at once"),
        ("tora.environments.nothing.play", "tora.environments.nothing does not exist"),
        ("tora.environments.verifiers_v1.nothing", "has no attribute 'nothing'"),
    ],
)
def test_what_is_not_there_is_refused_at_once(python: str, module: Path, path: str, said: str) -> None:
    (module / "broken.py").write_text("1 / 0")
    (module / "leaves.py").write_text("raise SystemExit(5)")
    (module / "dies.py").write_text("import os; os._exit(5)")
    with pytest.raises(ConfigError, match=said):
        Program(path, python)


def test_settings() -> None:
    with pytest.raises(ConfigError, match="/nowhere/python is no Python interpreter"):
        Elsewhere("/nowhere/python", "there.act")
    with pytest.raises(ConfigError, match="agent_python=python has no effect without agent"):
        load_config("quickstart", ["agent_python=python"])
