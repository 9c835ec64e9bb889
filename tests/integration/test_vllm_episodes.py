"""Episodes with vLLM: five exact turns, what the prefix cache serves, and parsers beside the built-in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import shake
from agents import (
    SCHEMA,
    Agents,
    agents,
    always_look,
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

from actors.vllm_engine.engine import VLLMEngine
from actors.vllm_engine.weight_updates import InFlight
from learner.learner import Learner
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.config.schema import RolloutConfig
from tora.environments.tools import MalformedCall, Parsed, ToolCall, VLLMParser, make_parser, parse_hermes
from tora.errors import ConfigError
from tora.launch.engines import engine_config, make_vllm_engine
from tora.models.vision.processor import ImageProcessor
from tora.types import Group, Rollout

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tool_model(tmp_path_factory.mktemp("model"))
    write_environments(folder)
    return folder


class Cached:
    """The `step` of an engine, which notes what each request found in vLLM's prefix cache."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, ...], int] = {}
        """By the request's prompt."""
        self.block = 0

    def __call__(self, llm: Any) -> Any:
        self.block = llm.vllm_config.cache_config.block_size
        outputs = llm.step()
        self.tokens |= {tuple(output.prompt_token_ids): output.num_cached_tokens for output in outputs}
        return outputs


class Played:
    """A worker with vLLM and in-flight updates, whose environments are in the folder."""

    def __init__(self, made: Agents, learner: Learner, cached: Cached) -> None:
        self.made, self.learner, self.cached = made, learner, cached
        self.version = -1
        """The newest."""
        self.after_turn: Callable[[], None] = lambda: None
        """Called once each time that a turn was read."""

    def run(self, *numbers: int) -> list[Group]:
        prompts = [self.made.prompt(number) for number in numbers]
        results = self.made.worker.run_groups(prompts)
        return [result.with_prompt(prompt) for result, prompt in zip(results, prompts, strict=True)]

    def publish(self) -> None:
        self.version += 1
        self.made.worker.forward(replace(self.learner.snapshot(), version=self.version))

    def parse(self, text: str) -> Parsed:
        self.after_turn()
        return always_look(text)

    def hits(self, group: Group, rollout: Rollout) -> Iterator[tuple[int, int, int]]:
        """Of each turn but the first: its prompt's tokens, those of them that the cache served, and those that it can
        serve if the turns before were computed by the same policy: whole blocks, without the last token sampled."""
        edges = np.flatnonzero(np.diff(rollout.sampled.astype(int))) + 1
        begins, ends = edges[2::2], edges[1::2]  # the prompt's rest comes first
        for begin, end in zip(begins, ends, strict=True):
            prompt = (*group.prompt.token_ids, *rollout.token_ids[:begin].tolist())
            before = len(group.prompt.token_ids) + int(end) - 1
            yield len(prompt), self.cached.tokens[prompt], before // self.cached.block * self.cached.block


@pytest.fixture(scope="module")
def played(folder: Path) -> Iterator[Played]:
    cfg = config(folder, rollout=RolloutConfig(engine="vllm", max_model_len=512))
    learner, cached = Learner(cfg), Cached()
    shake(learner.model)

    def engine() -> VLLMEngine:
        update = InFlight(recompute_kv=False)
        return VLLMEngine(engine_config(cfg, str(folder), 1.0), update=update, step=cached)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        with agents(engine, folder, parse=lambda text: played.parse(text)) as made:
            played = Played(made, learner, cached)
            played.publish()
            yield played


def test_five_turns_are_trained_on_exactly_what_was_sampled(played: Played) -> None:
    groups = played.run(3, 4)
    for group in groups:
        assert len(group.rollouts) == 4
        check_five_turns(group)
    check_exact(played.learner, groups, share_prefix=False)
    played.publish()
    (later,) = played.run(3)
    assert all((rollout.versions == played.version).all() for rollout in later.rollouts)


def test_a_turn_finds_the_turns_before_in_the_cache(played: Played) -> None:
    (group,) = played.run(5)
    found = [hit for rollout in group.rollouts for hit in played.hits(group, rollout)]
    assert len(found) == 16
    for tokens, served, at_most in found:
        assert served == at_most > tokens / 2


def test_no_turn_finds_what_an_older_policy_has_computed(played: Played) -> None:
    """The policy changes between the second turn and the third, whose request comes to the new one."""
    turns = 0

    def update() -> None:
        nonlocal turns
        turns += 1
        if turns == 8:  # the last of four rollouts' second turns
            shake(played.learner.model, seed=1)
            played.publish()

    played.after_turn = update
    try:
        (group,) = played.run(6)
    finally:
        played.after_turn = lambda: None
    found_first = []
    for rollout in group.rollouts:
        (_, second, most), (tokens, third, _), *later = played.hits(group, rollout)
        assert second == most > 0 and tokens > most
        assert all(served == at_most > 0 for _, served, at_most in later)
        shared = len(group.prompt.token_ids) + int(rollout.sampled.argmax())
        assert third <= shared, "what another rollout's third turn has just computed"
        found_first.append(third)
    assert 0 in found_first
    versions = np.concatenate([rollout.versions for rollout in group.rollouts])
    batch = pack(OwnPrompts(), [(group.prompt, r, 0.0, 0) for r in group.rollouts], [1.0] * 4)
    errors = np.abs(played.learner.logprobs(batch, adapter=True) - batch.actor_logprobs_N)
    newest = versions == versions.max()
    assert 0 < newest.sum() < len(versions)
    assert errors[newest].max() <= 1e-4 < errors[~newest].max(), "they are the new policy's, of its own keys and values"


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


PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAKES_A = {"type": "function", "function": {**SCHEMA["function"], "parameters": PARAMETERS}}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("llama3_json", '{"name": "look", "parameters": {"a": 1}}'),
        ("pythonic", "[look(a=1)]"),
        ("qwen3_json", '<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'),
        ("qwen3_coder", "<tool_call>\n<function=look>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"),
        ("mistral", '[TOOL_CALLS]look[ARGS]{"a": 1}'),
    ],
)
def test_vllms_parsers_by_name(folder: Path, name: str, call: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|python_tag|>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]"])
    parse = make_parser(name, tokenizer, [TAKES_A])
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
