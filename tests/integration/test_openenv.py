"""An environment of OpenEnv's own package, behind its own server. Left out where `openenv` is not installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import steps, train

from tora.environments.content import Content
from tora.environments.processes import EnvironmentProcesses
from tora.environments.tools import ToolCall, tool_schemas
from tora.types import FailedReward, Prompt

PYTHON = os.environ.get("OPENENV_PYTHON")
"""An interpreter that has OpenEnv, where this one has not: beside vLLM it cannot."""
if PYTHON is None:
    pytest.importorskip("openenv.core.env_server", exc_type=ImportError)
OTHER = {} if PYTHON is None else {"python": PYTHON}
SERVER = """
import sys
import uvicorn
from openenv.core.env_server import Environment, create_fastapi_app
from openenv.core.env_server.types import Action, Observation, State

class Guess(Action):
    number: int

class Said(Observation):
    text: str = ""

class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, secret=7, answer=None, **other):
        self.secret = int(answer or secret)
        return Said(text=" It is between 1 and 30.")

    def step(self, action, **other):
        right = action.number == self.secret
        said = "correct" if right else "higher" if action.number < self.secret else "lower"
        return Said(text=said, done=right, reward=1.0 if right else -0.125)

    @property
    def state(self):
        return State()

app = create_fastapi_app(Game, Guess, Said, max_concurrent_envs=256)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""

PROGRAM = '''
from tora.environments.openenv import OpenEnv

class Guesser(OpenEnv):
    """With the tool that the base calls, in place of `step`."""

    step = None

    async def guess(self, number: int) -> str:
        """
        Guess.

        Args:
            number: The guess.
        """
        return await OpenEnv.step(self, {"number": int(number)})
'''


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    script: Path = tmp_path_factory.mktemp("server") / "server.py"
    script.write_text(SERVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([PYTHON or sys.executable, str(script), str(port)])
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def test_each_rollout_plays_its_own_episode(address: str) -> None:
    factory = {"_component_": "tora.environments.openenv.OpenEnv", "base_url": address, "text": "text"}
    factory |= {"reset_columns": ["secret"], **OTHER}
    (schema,) = tool_schemas(factory, [])
    assert schema["function"]["name"] == "step" and "action" in schema["function"]["parameters"]["properties"]
    rewards = [{"_component_": "tora.environments.get_reward"}]
    made = EnvironmentProcesses(factory, [], rewards, timeout_s=20, reward_timeout_s=20, num_processes=1)

    def step(session, index: int, number: object) -> tuple[str, float]:
        call = ToolCall("step", {"action": {"number": number}})
        (result,) = session.settle(index, "a tool", session.call(index, [call]), time.monotonic())
        return result.content.text, result.turn_reward

    for _ in range(2):  # the second group plays on the same connections
        session = made.open(2)
        for index, secret in enumerate((7, 9)):
            seen = session.settle(
                index, "reset", session.reset(index, {"secret": secret, "other": 1}), time.monotonic()
            )
            assert seen == Content(" It is between 1 and 30.")
        assert step(session, 0, 8) == ("lower", -0.125) and step(session, 1, 8) == ("higher", -0.125)
        assert step(session, 0, 7) == ("correct", 1.0) and step(session, 0, 7) == ("The episode is over.", 0.0)
        text, _ = step(session, 1, "x")
        assert "error" in text, "an action that the environment refuses is told to the policy"
        scores = session.column(0, Prompt(0, (1,), "q", {}), [0, 1], [[], []], [[1], [1]])
        assert scores == [0.875, -0.125]
        session.close()
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_a_run(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """The base of the quick start knows no action: each of its calls is answered, and rewarded by the server."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    (tmp_path / "games.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    python = "" if PYTHON is None else f", python: {PYTHON}"
    written = train(
        "quickstart_guess", tmp_path / "run", "async_rl=false", f"rollout.engine={engine}", "eval=null",
        "environment_factory={_component_: games.Guesser, text: text, reset_columns: [answer], "
        f"base_url: '{address}'{python}}}", "rewards=[{_component_: tora.environments.get_reward}]",
    )  # fmt: skip
    assert len(steps(written)) == 3 and all(row["reward/failed_share"] == 0 for row in steps(written))
    assert all(row["mismatch_kl"] < 1e-9 and row["rollout/turns_mean"] > 1 for row in steps(written))
    assert any(row["reward/mean"] < 0 for row in steps(written)), "each wrong guess costs an eighth"


def test_a_server_that_is_not_there_costs_the_rollout() -> None:
    factory = {"_component_": "tora.environments.openenv.OpenEnv", "base_url": "http://127.0.0.1:1", **OTHER}
    rewards = [{"_component_": "tora.environments.get_reward"}]
    made = EnvironmentProcesses(factory, [], rewards, timeout_s=20, reward_timeout_s=20, num_processes=1)
    session = made.open(1)
    failed = session.settle(0, "reset", session.reset(0, {}), time.monotonic())
    assert isinstance(failed, FailedReward) and failed.reason.startswith("raised ")
    made.close()
