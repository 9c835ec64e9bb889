"""The tool that runs the policy's code: what it prints, and its limits."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from tora.environments.python import Python, python, run_code
from tora.environments.tools import tool_schemas

UNSHARE = "import ctypes; raise SystemExit(ctypes.CDLL(None).unshare(0x50000000))"


def test_what_the_code_prints() -> None:
    assert python("import math\nprint(math.factorial(10))") == "3628800\n"
    assert python("") == ""
    error = python("print('before')\n1 / 0")
    assert error.startswith("before\n") and error.endswith("ZeroDivisionError: division by zero\n")
    assert "line 2" in error and "_LIMIT" not in error
    (function, method) = (
        tool_schemas(None, ["tora.environments.python.python"]),
        tool_schemas({"_component_": "tora.environments.python.Python", "timeout_s": 2.0}, []),
    )
    assert function == method


def test_nothing_of_the_run_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_RUN", "1")
    assert python("import os; print('SECRET_OF_THE_RUN' in os.environ, os.listdir())") == "False ['code.py']\n"


LEAVES_A_CHILD = "import os, time\nif os.fork() == 0: time.sleep(60)"
"""The child keeps the output open."""


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", LEAVES_A_CHILD])
def test_code_that_takes_too_long(code: str) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="took longer than 1 s"):
        run_code(code, timeout_s=1.0, memory_mib=256)
    assert time.monotonic() - start < 20


def test_memory_files_and_output_are_limited() -> None:
    limits = {"timeout_s": 20.0, "memory_mib": 256}
    assert "MemoryError" in run_code("x = bytearray(2**30)", **limits)
    assert "too large" in run_code("import signal\nopen('f', 'wb').write(bytes(2**27))", **limits)
    long = run_code("print('a' * 10**6)\nprint('end')", **limits)
    assert len(long) < 4100 and long.startswith("aaa") and "\n...\n" in long and long.endswith("end\n")
    with pytest.raises(RuntimeError, match="SIGKILL"):
        run_code("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", **limits)


def test_there_is_no_network_where_the_kernel_allows() -> None:
    if subprocess.run([sys.executable, "-c", UNSHARE], check=False).returncode != 0:
        pytest.skip("this kernel lets no process give up its network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert "unreachable" in python(code)


def test_a_container_runtime_instead() -> None:
    """Any command that runs code from its standard input."""
    environment = Python(command=[sys.executable, "-c", "import sys; print('contained'); exec(sys.stdin.read())"])
    environment.reset(prompt="")
    assert environment.python("print(6 * 7)") == "contained\n42\n"
