"""Processes of rewards and environments whose parent ends while they start, as a stopped run's does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any

import pytest

from tora.environments import elsewhere_main
from tora.environments.host import Setup
from tora.rewards.processes import spawn

REWARDS = [{"_component_": "tora.rewards.answer_tag"}]
ENVIRONMENT = Setup({}, ("tora.tasks.sums.sums",), (), 64.0)


@pytest.mark.parametrize("has_asked", [True, False])
@pytest.mark.parametrize(
    ("module", "question"), [("tora.rewards.processes", REWARDS), ("tora.environments.host", ENVIRONMENT)]
)
def test_nobody_hears_of_it(module: str, question: Any, has_asked: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """A child has its question, or not even that, when its parent is gone."""
    process, connection = spawn(module, 5.0)
    if has_asked:
        connection.send(question)
    connection.close()
    assert process.wait(60) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("has_asked", [True, False])
def test_nor_in_another_interpreter(has_asked: bool) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, elsewhere_main.__file__, str(theirs.fileno()), "[]"],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
    if has_asked:
        ours.sendall(json.dumps({"path": "os.getcwd", "file": None}).encode() + b"\n")
    ours.close()
    assert process.communicate(timeout=60)[1] == b""
