"""Random episodes: whatever engine, policy and environment do, a rollout is exactly what the engine sampled.

The engine's tokens, log-probs and versions are random and change versions within a turn; turns stop or are cut at
random, call no tool, several or a malformed one; environments answer text of any kind, raise, or cannot be reset.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agents import Agents, agents, make_tool_model
from transformers import AutoTokenizer

from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts, SharedPrompts
from tora.environments.tools import MalformedCall, Parsed, ToolCall
from tora.run.group_files import load_groups, save_groups
from tora.types import Completion, Group, SampleRequest, StopReason

ENVIRONMENT = '''
import random

WORDS = ["", "warm", " 7", "\\n\\n", "<|im_end|>", "é", "\\U0001f600", "<tool_call>", "a" * 40]

class Wild:
    """Its answers are random, and the same for the same row and rollout."""

    def reset(self, seed, **row):
        self.random, self.row = random.Random(seed), row
        if self.random.random() < row["broken"]:
            raise ValueError("broken")
        return self.say()

    def say(self):
        return "".join(self.random.choices(WORDS, k=self.random.randrange(4)))

    def look(self, far: int = 0) -> str:
        """
        Look.

        Args:
            far: How far.
        """
        if self.random.random() < 0.2:
            raise KeyError("lost")
        return self.say()

    def get_reward(self):
        return self.random.random()
'''


def parse(text: str) -> Parsed:
    """What a turn calls depends on its text alone."""
    drawn = random.Random(hashlib.sha256(text.encode("utf-8", "replace")).digest())
    kinds = [ToolCall("look", {"far": 1}), ToolCall("sing", {}), ToolCall("look", {"near": 1}), MalformedCall("Bad.")]
    return Parsed("", tuple(drawn.choices(kinds, weights=(5, 1, 1, 1), k=drawn.choice((0, 1, 1, 1, 2, 3)))))


class Ledger:
    """An engine that samples at random, by the requests' seeds, and keeps what it returned, by context."""

    def __init__(self, seed: int, words: int, stop: int) -> None:
        self._seed, self._words, self._stop = seed, words, stop
        self._version, self._turn = 0, threading.Lock()
        self.fails_at = -1
        self.returned: dict[tuple[int, ...], list[Completion]] = {}

    def generate(self, requests: list[SampleRequest]) -> list[list[Completion]]:
        with self._turn:
            self.fails_at -= 1
            if self.fails_at == 0:
                raise RuntimeError("the engine died")
            drawn = [[self._sample(r, i) for i in range(r.num_samples)] for r in requests]
            for request, completions in zip(requests, drawn, strict=True):
                self.returned.setdefault(request.token_ids, []).extend(completions)
            return drawn

    def _sample(self, request: SampleRequest, number: int) -> Completion:
        draw, most = np.random.default_rng([self._seed, request.seed, number]), request.sampling.max_tokens
        length = min(most, int(draw.integers(1, 9)))
        stopped = length < most or bool(draw.random() < 0.5)
        ids = draw.integers(3, self._words, length if stopped else most)
        ids[-1] = self._stop if stopped else ids[-1]
        versions = self._version + np.cumsum(draw.random(len(ids)) < 0.05)
        self._version = int(versions[-1])
        logprobs = -draw.random(len(ids)).astype(np.float32)
        return Completion(ids, logprobs, logprobs, versions, stopped)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tool_model(tmp_path_factory.mktemp("model"))
    (folder / "wild.py").write_text(ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class Switch:
    """Stands for the ledger of the case, so that the environments' process stays."""

    ledger: Ledger

    def generate(self, requests: list[SampleRequest]) -> list[list[Completion]]:
        return self.ledger.generate(requests)

    def close(self) -> None: ...


@dataclass(frozen=True)
class Play:
    made: Agents
    engine: Switch
    iterations: int | None
    max_tokens: int

    def groups(self, ledger: Ledger, seed: int, broken: float) -> list[Group]:
        self.engine.ledger = ledger
        prompts = [self.made.prompt(number, seed=seed * 10 + number, broken=broken) for number in (1, 2)]
        results = self.made.worker.run_groups(prompts)
        return [result.with_prompt(prompt) for result, prompt in zip(results, prompts, strict=True)]


@pytest.fixture(scope="module", params=[(None, 4, 300, True), (3, None, 120, False)])
def play(folder: Path, request: pytest.FixtureRequest) -> Iterator[Play]:
    """Tokens of a part, rounds of answers, tokens of an episode, and whether episodes take their turns together."""
    part, iterations, max_tokens, together = request.param
    engine: Any = Switch()
    options: dict[str, Any] = {"iterations": iterations, "max_tokens": max_tokens, "part_tokens": part}
    options["together"] = together
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with agents(lambda: engine, folder, parse=parse, factory="wild.Wild", **options) as made:
            yield Play(made, engine, iterations, max_tokens)


def turns_of(group: Group, ledger: Ledger) -> list[list[Completion]]:
    """The completions that each rollout is made of, found in the ledger by their contexts; each is used once."""
    found = []
    for rollout in group.rollouts:
        ids, at, s, turns = rollout.token_ids.tolist(), 0, 0, []
        while at < len(ids):
            if not rollout.sampled[at]:
                at += 1
                continue
            known = ledger.returned.get((*group.prompt.token_ids, *ids[:at]), [])
            turn = next(c for c in known if np.array_equal(c.logprobs, rollout.actor_logprobs[s : s + len(c.logprobs)]))
            end = at + len(turn.token_ids)
            assert ids[at:end] == turn.token_ids.tolist() and rollout.sampled[at:end].all()
            np.testing.assert_array_equal(rollout.versions[s : s + len(turn.versions)], turn.versions)
            known[:] = [c for c in known if c is not turn]
            turns.append(turn)
            at, s = end, s + len(turn.versions)
        assert s == len(rollout.versions) == len(rollout.actor_logprobs) == rollout.sampled.sum()
        found.append(turns)
    return found


def given_texts(group: Group, parts: list[Completion], tokenizer: Any) -> list[str]:
    """The text before each turn, from an environment of the test's own."""
    names: dict[str, Any] = {}
    exec(ENVIRONMENT, names)
    wild, ids = names["Wild"](), []
    observation = wild.reset(**group.prompt.columns)
    texts = [f"{observation}<|im_end|>\n<|im_start|>assistant\n"]
    for part in parts[:-1]:
        ids += part.token_ids.tolist()
        if part.stopped:
            said = parse(tokenizer.decode(ids[:-1], skip_special_tokens=False))
            answers = "".join(f"<tool_response>\n{answer(wild, c)}\n</tool_response>" for c in said.calls)
            texts.append(f"\n<|im_start|>user{answers}<|im_end|>\n<|im_start|>assistant\n")
            ids = []
    return texts


def answer(wild: Any, call: ToolCall | MalformedCall) -> str:
    if isinstance(call, MalformedCall):
        return str({"error": call.reason})
    if call.name != "look":
        return str({"error": f"Tool {call.name} not found."})
    try:
        return wild.look(**call.arguments)
    except Exception as error:
        return str({"error": str(error)})


@pytest.mark.parametrize("seed", range(8))
def test_a_rollout_is_what_the_engine_sampled(play: Play, tokenizer: Any, tmp_path: Path, seed: int) -> None:
    limit, most = play.iterations, play.max_tokens
    ledger = Ledger(seed, 200, tokenizer.eos_token_id)
    groups = play.groups(ledger, seed, broken=(0.0, 0.3)[seed % 2])
    for group in groups:
        assert len(group.rollouts) + group.num_left_out == 4 and not group.bad_logprobs
        for rollout, parts in zip(group.rollouts, turns_of(group, ledger), strict=True):
            ended = [c.stopped for c in parts]
            assert len(rollout.token_ids) <= most and rollout.sampled[-1]
            assert rollout.turns == sum(ended) + (not ended[-1])
            assert rollout.stop_reason is StopReason.LENGTH or ended[-1]
            assert (rollout.stop_reason is StopReason.TOOL_LIMIT) <= (limit is not None and rollout.turns == limit + 1)
            assert rollout.tool_errors <= rollout.tool_calls <= 3 * rollout.turns
            texts = given_texts(group, parts, tokenizer)
            given = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert rollout.token_ids[~rollout.sampled].tolist() == given
        if group.rollouts:
            assert group.version == min(int(r.versions.min()) for r in group.rollouts)
    if not any(group.failures for group in groups):
        assert not any(ledger.returned.values()), "every token that was sampled is in a rollout"
    check_packed(groups)
    check_saved(groups, tmp_path)


def check_packed(groups: list[Group]) -> None:
    """The learner's arrays hold the same tokens, in both layouts."""
    sequences = [(g.prompt, r, 0.5, i) for i, g in enumerate(groups) for r in g.rollouts]
    if not sequences:
        return
    for packing in (OwnPrompts(), SharedPrompts()):
        batch = pack(packing, sequences, [1.0] * len(sequences))
        rollouts = [rollout for _, rollout, _, _ in sequences]
        assert batch.targets_N.tolist() == [t for r in rollouts for t in r.token_ids[r.sampled].tolist()]
        assert batch.versions_N.tolist() == [v for r in rollouts for v in r.versions.tolist()]
        np.testing.assert_array_equal(batch.actor_logprobs_N, np.concatenate([r.actor_logprobs for r in rollouts]))
        given = Counter(batch.tokens_T.tolist()) - Counter(batch.targets_N.tolist())
        assert Counter(batch.tokens_T[batch.given_T].tolist()) == given
        if isinstance(packing, OwnPrompts):
            np.testing.assert_array_equal(batch.tokens_T[batch.response_N + 1], batch.targets_N)


def check_saved(groups: list[Group], folder: Path) -> None:
    """A checkpoint gives the same groups back."""
    save_groups(folder, [(0, group) for group in groups])
    by_id = {group.prompt.id: group.prompt for group in groups}
    for (_, loaded), group in zip(load_groups(folder, by_id.__getitem__), groups, strict=True):
        for one, other in zip(loaded.rollouts, group.rollouts, strict=True):
            for name in ("token_ids", "sampled", "actor_logprobs", "versions"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert (one.turns, one.tool_calls, one.stop_reason) == (other.turns, other.tool_calls, other.stop_reason)


@pytest.mark.parametrize("seed", range(4))
def test_a_group_whose_engine_died_is_the_same_when_it_is_run_again(play: Play, tokenizer: Any, seed: int) -> None:
    """Its environments are given back, and nothing of the first try is in the second."""
    whole = play.groups(Ledger(seed, 200, tokenizer.eos_token_id), seed, broken=0.0)
    dying = Ledger(seed, 200, tokenizer.eos_token_id)
    dying.fails_at = 1 + seed % 3
    with pytest.raises(RuntimeError, match="the engine died"):
        play.groups(dying, seed, broken=0.0)
    again = play.groups(Ledger(seed, 200, tokenizer.eos_token_id), seed, broken=0.0)
    for group, other in zip(whole, again, strict=True):
        assert [r.token_ids.tolist() for r in group.rollouts] == [r.token_ids.tolist() for r in other.rollouts]
        assert [r.reward for r in group.rollouts] == [r.reward for r in other.rollouts]
