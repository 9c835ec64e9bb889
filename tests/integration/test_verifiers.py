"""Environments of verifiers v1, by its own package in its own interpreter. `VERIFIERS_PYTHON` names one that has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from runs import steps, train

from tora.reporting.completions import read_parquet
from tora.tasks.verifiers_v1 import tasks

PYTHON = os.environ.get("VERIFIERS_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="VERIFIERS_PYTHON names no interpreter that has verifiers"),
]
TASKSET = '''
import random, re
import verifiers.v1 as vf

class CalculatorToolset(vf.Toolset[vf.SharedToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    def calculate(self, expression: str) -> str:
        """Work out an arithmetic expression, such as 12 * 34."""
        first, second = re.fullmatch(r"\\s*(\\d+)\\s*[*]\\s*(\\d+)\\s*", expression).groups()
        return f"{int(first) * int(second)} by MCP"

class ProductData(vf.TaskData):
    answer: str

class ProductTask(vf.Task[ProductData]):
    @vf.reward(weight=2.0)
    async def answered(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or "") % 5)

    @vf.reward(weight=0.5)
    async def fails(self, trace: vf.Trace) -> float:
        if self.data.answer == "bad":
            raise ValueError("this task cannot be scored")
        return 1.0

class ProductConfig(vf.TasksetConfig):
    tools: vf.SharedToolsetConfig = vf.SharedToolsetConfig()
    broken: int = -1

class ProductTaskset(vf.Taskset[ProductTask, ProductConfig]):
    @classmethod
    def toolsets(cls, config: ProductConfig) -> list[vf.Toolset]:
        return [CalculatorToolset(config.tools)]

    def load(self):
        for n in range(16):
            answer = "bad" if n == self.config.broken else "good"
            yield ProductTask(ProductData(prompt=f"What is {11 + n} * {50 + n} ?", answer=answer), self.config.task)

__all__ = ["ProductTaskset"]

if __name__ == "__main__":
    CalculatorToolset.run()
'''
TASKSET_OF = "taskset: {id: products_v1, broken: BROKEN}"
ENVIRONMENT = f"{{{TASKSET_OF}, agent: {{harness: {{id: 'null'}}, runtime: {{type: subprocess}}}}}}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A virtual environment over the given one in which the taskset is installed, as verifiers wants it."""
    assert PYTHON is not None
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "products_v1.py").write_text(TASKSET)
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    below = subprocess.check_output([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (packages,) = (folder / "venv/lib").glob("*/site-packages")
    (packages / "products.pth").write_text(f"{below}{folder}\n")
    return str(folder / "venv/bin/python")


@pytest.fixture
def path_with_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """verifiers' own harness is a script that uv runs."""
    monkeypatch.setenv("PATH", f"{Path(str(PYTHON)).parent}:{os.environ['PATH']}")


def test_its_tasks_are_rows(python: str) -> None:
    rows = tasks({"taskset": {"id": "products_v1"}}, python, first=14)
    assert [row["prompt"] for row in rows] == [
        [{"role": "user", "content": "What is 25 * 64 ?"}],
        [{"role": "user", "content": "What is 26 * 65 ?"}],
    ]
    assert rows[0]["task"]["answer"] == "good" and rows[0]["task"]["idx"] == 14


def test_a_run_with_its_own_harness_tools_and_rewards(
    tmp_path: Path, python: str, path_with_uv: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The second task cannot be scored."""
    environment = ENVIRONMENT.replace("BROKEN", "1")
    written = train(
        "quickstart_tools", tmp_path / "run", "async_rl=false", "rollout.engine=torch", "num_steps=1", "batch_size=2",
        "eval=null", "tools=[]", "max_tool_calling_iterations=null", "shuffle=false", "environment_timeout_s=120",
        f"dataset={{_component_: tora.tasks.verifiers_v1.tasks, python: {python}, environment: {environment}}}",
        "agent=tora.environments.verifiers_v1.play", f"agent_python={python}", "log_completions=1",
        "rewards=[{_component_: tora.environments.get_reward}]", "max_failed_rewards=0.9",
    )  # fmt: skip
    (row,) = steps(written)
    assert row["mismatch_kl"] < 1e-9 and row["learner/grad_norm"] > 0
    assert row["reward/failed/agent"] == 4 and "this task cannot be scored" in caplog.text
    table = read_parquet(tmp_path / "run/completions/step_1.parquet")
    assert len(table) == 8 and all(r["reward"] % 1 == 0.5 for r in table), "the sum of both rewards"
    assert any("by MCP" in r["messages"] for r in table), "the tools of its server were called"
