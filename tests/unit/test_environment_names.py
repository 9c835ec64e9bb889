"""Several environments in one run, of which each row of the dataset chooses one, as in TRL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import steps, train

from tora.config.environments import by_name, chosen
from tora.config.load import load_config
from tora.environments.content import Content
from tora.errors import ConfigError
from tora.reporting.completions import read_parquet
from tora.tasks.dataset import empty_rows, file_dataset
from tora.tasks.prompts import RunPrompts

ENVIRONMENTS = '''
import json

class Sums:
    """The base of the quick start calls its only tool."""

    def reset(self, **row):
        assert "environment" not in row and row["prompt"]
        self.row, self.calls = row, 0

    def calculate(self, expression: str) -> str:
        """
        Calculate.

        Args:
            expression: What.
        """
        self.calls += 1
        return f"sums {expression}"

class Doors(Sums):
    def __init__(self, color: str):
        self.color = color

    def open(self, door: str) -> str:
        """
        Open.

        Args:
            door: Which.
        """
        return self.color

    calculate = None

    def get_reward(self):
        return 0.5

def number(environments, completions, **columns):
    """Each environment is of the kind that its row names."""
    assert {type(e).__name__.lower() for e in environments} == set(columns["kind"])
    return [float(e.calls) + len(str(c)) % 3 for e, c in zip(environments, completions)]

def rows():
    return [{"prompt": f"What is {n} * {m} ?", "environment": kind, "kind": kind, "answer": "0"}
            for n in range(11, 20) for m, kind in ((31, "sums"), (67, "doors"))]

def unknown():
    return [{"prompt": "a", "environment": "doorz"}]

def routed():
    return [{"environment": kind, "answer": "0"} for kind in ("sums", "doors")]

def nulls():
    return [{**row, "prompt": None} for row in routed()]

def unnamed():
    return [{"prompt": "a"}]
'''
FACTORIES = "environment_factory={sums: {_component_: names.Sums}, doors: {_component_: names.Doors, color: red}}"
RUN = [
    "tools=[]", FACTORIES, "dataset={_component_: names.rows}", "eval.dataset={_component_: names.rows}",
    "rewards=[{_component_: names.number}, {_component_: tora.environments.get_reward}]", "log_completions=1",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "names.py").write_text(ENVIRONMENTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_run(folder: Path, *overrides: str) -> None:
    rows = train("quickstart_tools", folder / "run", *RUN, *overrides)
    assert len(steps(rows)) == 3
    assert all(row["reward/failed_share"] == 0 for row in steps(rows))
    assert all(row["mismatch_kl"] < 1e-9 for row in steps(rows) if row["staleness/max"] == 0)
    table = [r for step in (1, 2, 3) for r in read_parquet(folder / f"run/completions/step_{step}.parquet")]
    answered = {"31": [], "67": []}
    for row in table:
        answers = [m["content"] for m in json.loads(row["messages"]) if m["role"] == "tool"]
        answered["31" if "* 31" in row["prompt"] else "67"] += answers
    assert answered["31"] and all(text.startswith("sums ") for text in answered["31"])
    assert not any(text.startswith("sums ") for text in answered["67"]), "the other's tools are not to be had"
    assert answered["67"]


def test_a_run_with_two(folder: Path) -> None:
    check_run(folder, "async_rl=false", "rollout.engine=torch")


@pytest.mark.slow  # starts an engine and a cluster of its own
def test_a_run_with_two_and_vllm(folder: Path) -> None:
    pytest.importorskip("vllm")
    check_run(folder, "async_rl=true", "rollout.engine=vllm")


def test_each_prompt_shows_its_own_tools(folder: Path) -> None:
    prompts = RunPrompts(load_config("quickstart_tools", RUN))
    for prompt in prompts.first(6):
        text = prompts.tokenizer.decode(prompt.token_ids)
        own, other = ("calculate", "open") if prompt.columns["environment"] == "sums" else ("open", "calculate")
        assert own in text and other not in text


@pytest.mark.parametrize("rows", ["routed", "nulls"])
def test_a_row_needs_no_prompt_where_an_environment_gives_it(folder: Path, rows: str) -> None:
    """As in TRL: an empty user message, which the observation fills."""
    overrides = [*RUN, f"dataset={{_component_: names.{rows}}}", "eval=null"]
    prompts = RunPrompts(load_config("quickstart_tools", overrides))
    for prompt in prompts.first(2):
        assert prompt.source == "" and "prompt" not in prompt.columns
        turns = prompts.turns.of(prompt.columns)
        empty = [{"role": "user", "content": ""}]
        assert prompt.token_ids == turns.prompt(empty)
        asked = [{"role": "user", "content": "What is 2 * 3 ?"}]
        whole = prompt.token_ids + turns.opening(prompt.source, Content("What is 2 * 3 ?"))
        assert whole == turns.prompt(asked) + turns.opening(asked, None)
    with pytest.raises(ConfigError, match=r"row [0-9]+ has no column prompt|its prompt is null"):
        RunPrompts(load_config("quickstart_tools", [f"dataset={{_component_: names.{rows}}}", "eval=null"])).first(1)


def test_a_file_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"answer": "1", "environment": "sums"}\n')
    with pytest.raises(ConfigError, match=r"no column prompt \(prompt_key\).*prompt_key=null is for an environment"):
        file_dataset(str(tmp_path / "rows.jsonl"))
    assert file_dataset(str(tmp_path / "rows.jsonl"), prompt_key=None)[0] == {"answer": "1", "environment": "sums"}
    brief = file_dataset(str(tmp_path / "rows.jsonl"), prompt_key=None, system_prompt="Be brief.")[0]["prompt"]
    assert [(m["role"], m["content"]) for m in brief] == [("system", "Be brief."), ("user", "")]
    with pytest.raises(ConfigError, match="num_rows is 0"):
        empty_rows(0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("unknown", 'row 0: its environment="doorz" is not one of environment_factory.s: sums, doors; the nearest is'),
        ("unnamed", "row 0: it has no column environment, which names its environment: one of sums, doors"),
    ],
)
def test_a_row_that_names_none_is_refused(folder: Path, rows: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunPrompts(load_config("quickstart_tools", [*RUN, f"dataset={{_component_: names.{rows}}}"])).first(1)


@pytest.mark.parametrize("name", [3, True, 1.5, ["sums"], {"a": 1}, ""])
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(ConfigError, match="is not one of"):
        chosen({"environment": name}, ["sums", "doors"])


def test_a_config_with_one_needs_no_column() -> None:
    one = {"_component_": "names.Sums"}
    assert by_name(one) == {"": one} and by_name(None) == {} and chosen({"environment": "x"}, [""]) == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{}", "environment_factory={} must hold _component_"),
        ("{sums: names.Sums}", "environment_factory.sums=.*must hold _component_ and its arguments"),
        ("{sums: {_component_: tora.tasks.guess_number.Guess}}", "environment_factory.sums.*the nearest is"),
        ("{a: {_component_: tora.environments.openenv.OpenEnv, url: 3}}", "environment_factory.a.*url"),
    ],
)
def test_wrong_configs_are_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", [f"environment_factory={value}"])
