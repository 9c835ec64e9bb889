"""Episodes with vLLM: token-exact over five turns, and its parsers beside the built-in one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from adapters import shake
from agents import (
    SCHEMA,
    agents,
    check_exact,
    check_five_pictures,
    check_five_turns,
    check_tool_run,
    make_tool_model,
    make_tool_vl_model,
    write_environments,
)
from learners import config
from runs import steps
from runs import train as short_run
from transformers import AutoTokenizer

from learner.learner import Learner
from tora.config.schema import RolloutConfig
from tora.environments.tools import MalformedCall, ToolCall, VLLMParser, make_parser, parse_hermes
from tora.errors import ConfigError
from tora.launch.engines import make_vllm_engine
from tora.models.vision.processor import ImageProcessor

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tool_model(tmp_path_factory.mktemp("model"))
    write_environments(folder)
    return folder


def test_five_turns_are_trained_on_exactly_what_was_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    cfg = config(folder, rollout=RolloutConfig(engine="vllm", max_model_len=512))
    learner = Learner(cfg)
    shake(learner.model)
    with agents(partial(make_vllm_engine, cfg), folder) as made:
        made.worker.forward(learner.snapshot())
        prompts = [made.prompt(number) for number in (3, 4)]
        results = made.worker.run_groups(prompts)
        groups = [result.with_prompt(prompt) for result, prompt in zip(results, prompts, strict=True)]
        for group in groups:
            assert len(group.rollouts) == 4
            check_five_turns(group)
        check_exact(learner, groups, share_prefix=False)
        made.worker.forward(learner.snapshot())
        later = made.worker.run_group(prompts[0])
        assert all((rollout.versions == 1).all() for rollout in later.rollouts)


@pytest.mark.slow  # starts an engine of its own
def test_five_turns_with_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tool_vl_model(tmp_path)
    write_environments(tmp_path)
    monkeypatch.chdir(tmp_path)
    cfg = config(tmp_path, rollout=RolloutConfig(engine="vllm"))
    learner = Learner(cfg)
    shake(learner.model)
    image_token = ImageProcessor(tmp_path).image_token_id
    with agents(partial(make_vllm_engine, cfg), tmp_path, factory="envs.Viewer", max_tokens=700) as made:
        made.worker.forward(learner.snapshot())
        prompts = [made.prompt(number) for number in range(1, 9)]
        results = made.worker.run_groups(prompts)
    groups = [result.with_prompt(prompt) for result, prompt in zip(results, prompts, strict=True)]
    check_five_pictures(groups, image_token)
    assert sum(r.tool_errors for g in groups for r in g.rollouts) > 0, "some episodes hold placeholders of their own"
    check_exact(learner, groups, share_prefix=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


CALL = '<tool_call>\n{"name": "look", "arguments": {"a": [1, "ü"]}}\n</tool_call>'


@pytest.mark.parametrize("text", ["", "Lima.", CALL, f"I ask.\n{CALL}\n{CALL}", CALL.removesuffix("\n</tool_call>")])
def test_the_built_in_parser_reads_what_vllms_does(tokenizer, text: str) -> None:
    from vllm.tool_parsers import ToolParserManager

    theirs = VLLMParser(ToolParserManager.get_tool_parser("hermes"), tokenizer, [SCHEMA])
    assert theirs(text) == parse_hermes(text)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("llama3_json", '{"name": "look", "parameters": {"a": 1}}'),
        ("pythonic", "[look(a=1)]"),
    ],
)
def test_vllms_parsers_by_name(folder: Path, name: str, call: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("<|python_tag|>")
    parse = make_parser(name, tokenizer, [SCHEMA])
    assert parse(call).calls == (ToolCall("look", {"a": 1}),)
    assert parse("Lima.").calls == ()
    assert parse(call).calls == (ToolCall("look", {"a": 1}),), "one turn leaves nothing for the next"


def test_an_unknown_parser_is_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match="llama3_jso is not one of vLLM's parsers"):
        make_parser("llama3_jso", tokenizer, [SCHEMA])
    with pytest.raises(ConfigError, match="llama3_json does not fit the model"):
        make_parser("llama3_json", tokenizer, [SCHEMA])
    assert isinstance(make_parser("hermes", tokenizer, [])("<tool_call>").calls[0], MalformedCall)


@pytest.mark.parametrize("overrides", [["async_rl=false"], ["async_rl=true", "rollout.partial=16", "max_staleness=1"]])
def test_a_run(tmp_path: Path, overrides: list[str]) -> None:
    rows = short_run("quickstart_tools", tmp_path / "run", "rollout.engine=vllm", *overrides)
    check_tool_run(rows)
    newest = [row["mismatch_kl"] for row in steps(rows) if row["staleness/max"] == 0]
    assert newest and max(newest) < 1e-9
