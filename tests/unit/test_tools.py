"""Schemas of tools, and the calls in what a policy wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from agents import ENVIRONMENTS
from pages import ROOT, write_files

from tora.config.components import locate
from tora.config.load import load_config
from tora.environments.tools import MalformedCall, ToolCall, parse_hermes, tool_schemas
from tora.errors import ConfigError
from tora.tasks.calculator import calculate, calculator
from tora.tasks.guess_number import GuessNumber, guess_number


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the working directory; each test's has its own name, because imports are cached."""
    name = f"envs_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(ENVIRONMENTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_an_environments_public_methods_and_the_tools_have_schemas(module: str) -> None:
    factory = {"_component_": f"{module}.Counter"}
    schemas = {s["function"]["name"]: s["function"] for s in tool_schemas(factory, [f"{module}.add"])}
    assert set(schemas) == {"look", "wait", "act", "add"}, "not reset, get_reward or __init__"
    assert schemas["look"]["description"] == "Look around."
    assert schemas["wait"]["parameters"]["properties"] == {"seconds": {"type": "number", "description": "How long."}}
    assert schemas["add"]["parameters"]["required"] == ["a", "b"]
    assert "self" not in schemas["wait"]["parameters"]["properties"]


@pytest.mark.parametrize(
    ("factory", "tools", "message"),
    [
        ("NoReset", [], "NoReset has no method reset"),
        ("Undescribed", [], "the tool look cannot be described"),
        ("Missing", [], "Missing does not exist"),
        ("Counter", ["add", "add"], "2 tools have the name add"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(module: str, factory: str, tools: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tool_schemas({"_component_": f"{module}.{factory}"}, [f"{module}.{tool}" for tool in tools])


CALL = '<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'
LOOK = ToolCall("look", {"a": 1})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Lima.", "Lima.", []),
        ("", "", []),
        (CALL, "", [LOOK]),
        (f"I ask.\n{CALL}\n{CALL}", "I ask.", [LOOK, LOOK]),
        (CALL.removesuffix("\n</tool_call>"), "", [LOOK]),
        ("</tool_call>", "</tool_call>", []),
    ],
)
def test_hermes_calls(text: str, content: str, calls: list[ToolCall]) -> None:
    parsed = parse_hermes(text)
    assert (parsed.content, list(parsed.calls)) == (content, calls)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"name": "look"', "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"name": 3, "arguments": {}}', "must be a JSON object"),
        ('{"name": "look"}', "`arguments` of the call to look"),
        ('{"name": "look", "arguments": "{}"}', "`arguments` of the call to look"),
    ],
)
def test_a_malformed_call_is_one_and_does_not_hide_others(body: str, reason: str) -> None:
    bad, good = parse_hermes(f"<tool_call>{body}</tool_call>{CALL}").calls
    assert isinstance(bad, MalformedCall) and reason in bad.reason
    assert good == LOOK


@pytest.mark.parametrize(("text", "value"), [("47 * 86", "4042"), (" (2 - 5) * -7", "21"), ("3", "3")])
def test_the_calculator(text: str, value: str) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize("text", ["2 ** 9", "__import__('os')", "1 / 2", "", "9 *" * 20 + "9", "True", "a"])
def test_the_calculator_refuses(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        calculate(text)


TOOL = "tools=[tora.tasks.calculator.calculate]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tools=[tora.tasks.calculator.calculat]"], "tools.0=.*the nearest is|tools.0=.*does not exist"),
        (["tools=[calculate]"], "tools.0=.*must be a dotted path"),
        (["tools=[tora.tasks.calculator.calculate,tora.tasks.calculator.calculate]"], "tools.1=.*already used"),
        (["environment_factory._component_=tora.tasks.guess_number.Guess"], "environment_factory"),
        (["max_tool_calling_iterations=3"], "has no effect without"),
        (["rewards.0._component_=tora.environments.get_reward"], "needs environment_factory"),
        ([TOOL, "rewards.0._component_=tora.environments.get_reward"], "needs environment_factory"),
        ([TOOL, "learner_ranks=2", "async_rl=false", "rollout.engine=torch"], "ranks that share one model"),
        ([TOOL, "max_tool_calling_iterations=99", "environment_timeout_s=30"], "must be greater than the 3000 s"),
    ],
)
def test_wrong_configs_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", overrides)


def test_the_environment_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(tmp_path, ROOT / "docs/agents.md")
    assert len((tmp_path / "my_environment.py").read_text().splitlines()) <= 20
    (schema,) = tool_schemas({"_component_": "my_environment.Maze"}, [])
    assert schema["function"]["parameters"]["properties"]["door"] == {"type": "string", "description": "Its colour."}
    maze = locate("my_environment.Maze")()
    assert maze.reset(prompt="Leave the maze.", exit="blue", answer="blue").startswith(" You see")
    assert (maze.open("red"), maze.get_reward(), maze.open("blue"), maze.get_reward()) == (
        "A wall.",
        0,
        "You are out.",
        1,
    )


def test_guess_number() -> None:
    train, test = (guess_number(split, num_rows=300) for split in ("train", "test"))
    assert guess_number(num_rows=5) == train[:5]
    games = [{(row["highest"], row["answer"]) for row in rows} for rows in (train, test)]
    assert len(games[0]) > 100 and len(games[1]) > 10 and not games[0] & games[1]
    for wrong in ({"split": "dev"}, {"num_rows": 0}, {"lowest": 9}, {"highest": 23}):
        with pytest.raises(ConfigError, match="guess_number: "):
            guess_number(**wrong)
    game = GuessNumber()
    for row in train[:3]:
        assert game.reset(**row) == f" It is between 1 and {row['highest']}." and game.get_reward() == 0
        assert game.guess(0) == "higher" and game.guess(32) == "lower" and game.get_reward() == 0
        assert game.guess(row["answer"]) == "correct" and game.guess(0) == "higher" and game.get_reward() == 1


def test_the_calculators_questions() -> None:
    train, test = (calculator(split=split, num_rows=500) for split in ("train", "test"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in (*train, *test):
        assert calculate(row["prompt"].removeprefix("What is ").removesuffix(" ?")) == row["answer"]
    assert calculator(num_rows=5) == calculator(num_rows=9)[:5]
    for wrong in ({"split": "dev"}, {"num_rows": 0}):
        with pytest.raises(ConfigError, match="calculator: "):
            calculator(**wrong)
