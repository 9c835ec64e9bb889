"""Environments in real processes: what they answer, and what misbehaving ones cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import ENVIRONMENTS

from tora.environments.content import Content
from tora.environments.host import ToolResult
from tora.environments.processes import EnvironmentProcesses, Session
from tora.environments.tools import ToolCall, check_turn_rewards
from tora.errors import ConfigError, ToraError
from tora.types import FailedReward, Prompt

PROMPT = Prompt(0, (1,), [{"role": "user", "content": "q"}], {"answer": "2"})
LOOK = ToolCall("look", {})


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "envs.py").write_text(ENVIRONMENTS)
    monkeypatch.chdir(tmp_path)
    made: list[EnvironmentProcesses] = []

    def build(
        factory: str | None = "Counter",
        tools: tuple[str, ...] = (),
        rewards: tuple[str, ...] = ("tora.environments.get_reward",),
        timeout_s: float = 5.0,
        num_processes: int = 2,
        **arguments: Any,
    ) -> EnvironmentProcesses:
        component = None if factory is None else {"_component_": f"envs.{factory}", **arguments}
        components = [{"_component_": reward} for reward in rewards]
        limits = {"timeout_s": timeout_s, "reward_timeout_s": timeout_s, "num_processes": num_processes}
        made.append(EnvironmentProcesses(component, tools, components, **limits))
        return made[-1]

    yield build
    for each in made:
        each.close()


def reset(session: Session, size: int, **row: Any) -> list[Any]:
    start = time.monotonic()
    asked = [session.reset(i, {"answer": "2", "index": i, **row}) for i in range(size)]
    return [session.settle(i, "reset", future, start) for i, future in enumerate(asked)]


def call(session: Session, index: int, *calls: ToolCall) -> Any:
    return session.settle(index, "a tool", session.call(index, calls), time.monotonic())


def texts(results: list[ToolResult]) -> list[str]:
    return [result.content.text for result in results]


def rewards(session: Session, *indices: int, number: int = 0) -> list[Any]:
    return session.column(number, PROMPT, indices, [[]] * len(indices), [[1]] * len(indices))


@pytest.mark.parametrize("factory", ["Counter", "AsyncCounter"])
def test_each_rollout_has_its_own_environment(make, factory: str) -> None:
    session = make(factory, ("envs.add",), ("tora.environments.get_reward", "envs.counts"), start=5).open(3)
    assert reset(session, 3, observation="hello") == [Content("hello")] * 3
    assert call(session, 1, LOOK, LOOK) == [ToolResult(Content("6 of 2")), ToolResult(Content("7 of 2"))]
    assert texts(call(session, 2, LOOK, ToolCall("add", {"a": 2, "b": 3}))) == ["6 of 2", "5"]
    assert call(session, 0) == []
    assert rewards(session, 0, 1, 2) == [5.0, 7.0, 6.0]
    assert rewards(session, 2, 1, number=1) == [60.0, 70.0]


def test_environments_are_made_once_and_reset_often(make) -> None:
    processes = make(num_processes=1)
    for _ in range(3):
        session = processes.open(2)
        assert reset(session, 2) == [None, None]
        assert call(session, 1, LOOK) == [ToolResult(Content("1 of 2"))]
        session.close()


def test_tools_alone(make) -> None:
    session = make(None, ("envs.add",), ("tora.rewards.answer_tag",)).open(1)
    assert reset(session, 1) == [None]
    assert call(session, 0, ToolCall("add", {"a": 2, "b": 3})) == [ToolResult(Content("5"))]


def test_a_tools_error_is_told_to_the_policy(make, caplog: pytest.LogCaptureFixture) -> None:
    session = make().open(1)
    reset(session, 1)
    wrong = [
        ToolCall("act", {"how": "raise"}),
        ToolCall("look", {"at": 1}),
        ToolCall("reset", {}),
        ToolCall("sing", {}),
    ]
    results = call(session, 0, *wrong)
    assert results[0].content.text == "{'error': 'bad'}" and "unexpected keyword" in results[1].content.text
    assert texts(results[2:]) == [f"{{'error': 'Tool {name} not found.'}}" for name in ("reset", "sing")]
    assert all(r.error is not None for r in results)
    call(session, 0, *wrong)
    assert caplog.text.count("in _act") == 1, "its traceback is shown once"
    assert call(session, 0, LOOK) == [ToolResult(Content("1 of 2"))], "and the environment goes on"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "raised ValueError: bad"),
        ("sleep", "took longer than 3 s"),
        ("lock", "took longer than 3 s"),
        ("exit", "ended its process"),
        ("sys.exit", "raised SystemExit: 2"),
        ("list", "raised TypeError: reset returned a list"),
        ("nan", "raised TypeError: reset returned a float"),
    ],
)
def test_a_reset_that_fails_costs_its_rollout(make, how: str, reason: str) -> None:
    """Except where it takes its process with it. The next group has a sound one."""
    processes = make("BadReset", timeout_s=3.0)
    session = processes.open(3)
    first, bad, last = reset(session, 3, how=how)
    assert isinstance(bad, FailedReward) and bad.name == "environment" and bad.reason.startswith(reason)
    if how not in ("lock", "exit"):
        assert first is None and last is None
        assert call(session, 0, LOOK) == [ToolResult(Content("1 of 2"))]
        assert rewards(session, 0, 2) == [1.0, 0.0]
    session.close()
    after = processes.open(3)
    assert reset(after, 3, how="nothing") == [None] * 3
    assert call(after, 1, LOOK) == [ToolResult(Content("1 of 2"))]


@pytest.mark.parametrize("how", ["sleep", "lock", "exit"])
def test_a_tool_that_hangs_or_dies_is_found(make, how: str) -> None:
    processes = make(timeout_s=3.0)
    session = processes.open(2)
    reset(session, 2)
    start = time.monotonic()
    failed = call(session, 1, ToolCall("act", {"how": how}))
    assert isinstance(failed, FailedReward) and time.monotonic() - start < 8
    other = call(session, 0, LOOK)
    assert other == [ToolResult(Content("1 of 2"))] if how == "sleep" else isinstance(other, FailedReward)
    session.close()
    assert reset(processes.open(2), 2) == [None, None]


def test_a_reward_that_raises_costs_its_rollout(make) -> None:
    session = make("BadReward").open(3)
    reset(session, 3)
    call(session, 1, LOOK)
    good, bad, last = rewards(session, 0, 1, 2)
    assert (good, last) == (0.0, 0.0) and bad == FailedReward("get_reward", "raised ValueError: bad")


def test_credit_by_turn_needs_a_method(make) -> None:
    make()
    check_turn_rewards({"_component_": "envs.Stepper"})
    with pytest.raises(ConfigError, match=r"envs\.Counter has no method get_turn_reward, which credit=turn needs"):
        check_turn_rewards({"_component_": "envs.Counter"})


def test_slow_tools_run_at_once(make) -> None:
    session = make().open(8)
    reset(session, 8)
    start = time.monotonic()
    asked = [session.call(i, [ToolCall("wait", {"seconds": 0.5})]) for i in range(8)]
    assert [session.settle(i, "a tool", f, start)[0].content.text for i, f in enumerate(asked)] == ["waited"] * 8
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Unmakeable", "environment_factory=envs.Unmakeable raised RuntimeError: no server"),
        ("Missing", "does not exist"),
    ],
)
def test_an_environment_that_cannot_be_made_ends_the_run(make, factory: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(factory)


def host_of(session: Session) -> int:
    reset(session, 1)
    return int(texts(call(session, 0, ToolCall("pid", {})))[0])


def test_a_process_that_is_stopped_costs_its_rollouts_a_time_limit(make) -> None:
    """As by SIGSTOP. The long row fills the pipe, and the process reads none of it."""
    processes = make("Counter", ("envs.pid",), timeout_s=1.0, num_processes=1)
    session = processes.open(2)
    host = host_of(session)
    os.kill(host, signal.SIGSTOP)
    began = time.monotonic()
    assert all(isinstance(each, FailedReward) for each in reset(session, 2, observation="x" * 500_000))
    assert time.monotonic() - began < 10
    session.close()
    assert host_of(processes.open(1)) != host and not Path(f"/proc/{host}").exists()


def test_a_process_outlives_the_signals_that_ask_its_parent_to_stop(make) -> None:
    processes = make("Counter", ("envs.pid",), num_processes=1)
    host = host_of(processes.open(1))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(host, number)
    assert host_of(processes.open(1)) == host


_UNREADABLE = """
class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")

raise Odd("no", "server")
"""


@pytest.mark.parametrize(("line", "message"), [("raise SystemExit(3)", "3"), (_UNREADABLE, "no server")])
def test_a_module_that_cannot_be_imported_ends_the_run(make, tmp_path: Path, line: str, message: str) -> None:
    """Also with an error that only its own process can read."""
    (tmp_path / "odd_envs.py").write_text(line)
    with pytest.raises(ToraError, match=message):
        make(None, ("odd_envs.look",))


@pytest.mark.parametrize("how", ["sleep", "lock"])
def test_a_process_ends_with_a_parent_that_was_killed(make, how: str) -> None:
    """Also one whose environment never gives up the interpreter lock, by a limit on its CPU time."""
    code = (
        "from tora.environments.processes import EnvironmentProcesses, ToolCall\n"
        "made = EnvironmentProcesses({'_component_': 'envs.Counter'}, ['envs.pid'], [{'_component_': 'envs.counts'}],"
        " timeout_s=1, reward_timeout_s=1, num_processes=1)\n"
        "session = made.open(1)\n"
        "session.reset(0, {'answer': ''}).result()\n"
        "print(session.call(0, [ToolCall('pid', {})]).result()[0].content.text, flush=True)\n"
        f"session.call(0, [ToolCall('act', {{'how': {how!r}}})]).result()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = Path("/proc", parent.stdout.readline().strip())
    assert child.exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
