"""Episodes of a rollout worker with the torch engine, real environment processes and a real learner."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import shake
from agents import (
    Agents,
    agents,
    always_look,
    check_exact,
    check_five_pictures,
    check_five_turns,
    make_tool_model,
    make_tool_vl_model,
    write_environments,
)
from learners import config
from torch_engines import engine_of

from actors.torch_engine.engine import TorchEngine
from learner.learner import Learner
from tora.environments.tools import MalformedCall, Parsed, ToolCall
from tora.models.vision.processor import ImageProcessor
from tora.run.group_files import load_groups, save_groups
from tora.types import Completion, FailedReward, Group, SampleRequest, StopReason


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tool_model(tmp_path_factory.mktemp("model"))
    write_environments(folder)
    return folder


@pytest.fixture
def learner(folder: Path) -> Learner:
    learner = Learner(config(folder), shares_model=True)
    shake(learner.model)
    return learner


@pytest.fixture
def make(folder: Path, learner: Learner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(folder)
    entered = []

    def build(**options: Any) -> Agents:
        context = agents(lambda: engine_of(learner), folder, **options)
        entered.append(context)
        return context.__enter__()

    yield build
    for context in entered:
        context.__exit__(None, None, None)


def run(agents: Agents, numbers: list[int], **columns: Any) -> list[Group]:
    prompts = [agents.prompt(number, **columns) for number in numbers]
    results = agents.worker.run_groups(prompts)
    return [result.with_prompt(prompt) for result, prompt in zip(results, prompts, strict=True)]


@pytest.mark.parametrize("share_prefix", [False, True])
def test_five_turns_are_trained_on_exactly_what_was_sampled(make, learner: Learner, share_prefix: bool) -> None:
    groups = run(make(), [3, 4])
    for group in groups:
        check_five_turns(group)
    assert len({tuple(r.token_ids) for g in groups for r in g.rollouts}) == 8
    check_exact(learner, groups, share_prefix)


@pytest.fixture(scope="module")
def vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tool_vl_model(tmp_path_factory.mktemp("vl"))
    write_environments(folder)
    return folder


@pytest.mark.parametrize(("share_prefix", "part"), [(True, None), (False, 3)])
def test_five_turns_with_pictures_are_trained_on_exactly_what_was_sampled(
    tmp_path: Path, vl_folder: Path, monkeypatch: pytest.MonkeyPatch, share_prefix: bool, part: int | None
) -> None:
    monkeypatch.chdir(vl_folder)
    learner = Learner(config(vl_folder), shares_model=True)
    shake(learner.model)
    processor = ImageProcessor(vl_folder)
    options = {"factory": "envs.Viewer", "max_tokens": 700, "part_tokens": part, "group_size": 4}
    with agents(lambda: engine_of(learner, processor=lambda: processor), vl_folder, **options) as made:
        groups = run(made, [1, 6])
    check_five_pictures(groups, processor.image_token_id)
    assert sum(r.tool_errors for g in groups for r in g.rollouts) > 0, (
        "some episode's own placeholders end its pictures"
    )
    check_exact(learner, groups, share_prefix)
    save_groups(tmp_path, [(0, group) for group in groups])
    loaded = load_groups(tmp_path, {g.prompt.id: g.prompt for g in groups}.__getitem__)
    assert [[r.images for r in g.rollouts] for _, g in loaded] == [[r.images for r in g.rollouts] for g in groups]


def test_pictures_for_a_text_model_cost_their_rollouts(make) -> None:
    (group,) = run(make(factory="envs.Viewer"), [3])
    assert not group.rollouts and "the model takes none" in group.failures[0].reason


def test_an_episode_is_the_same_alone_and_among_others(make) -> None:
    agents = make()
    both, (alone,) = run(agents, [3, 4]), run(agents, [4])
    for one, other in zip(both[1].rollouts, alone.rollouts, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()


class Held:
    """An engine that answers the first rollout's second turn once the others have ended."""

    def __init__(self, engine: TorchEngine, others: int) -> None:
        self._engine, self._others = engine, others
        self._held: tuple[int, ...] = ()
        self._ended, self._counting = threading.Event(), threading.Lock()

    def generate(self, requests: list[SampleRequest]) -> list[list[Completion]]:
        completions = self._engine.generate(requests)
        if not self._held:
            self._held = (*requests[0].token_ids, *completions[0][0].token_ids.tolist())
        elif any(r.token_ids[: len(self._held)] == self._held for r in requests):
            assert self._ended.wait(20), "the others wait for this one"
        else:
            with self._counting:
                self._others -= sum(r.num_samples for r in requests)
            if self._others == 0:
                self._ended.set()
        return completions

    def close(self) -> None: ...


def test_no_episode_waits_for_another_where_the_engine_answers_many(folder: Path, learner: Learner, make) -> None:
    """And all are as they would be together."""
    (together,) = run(make(), [3])
    engine: Any = Held(engine_of(learner), others=3 * 4)
    with agents(lambda: engine, folder, together=False) as made:
        (apart,) = run(made, [3])
    check_five_turns(apart)
    for one, other in zip(apart.rollouts, together.rollouts, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()


@pytest.mark.parametrize("part", [1, 3, 7])
def test_turns_in_parts(make, learner: Learner, part: int) -> None:
    (group,) = run(make(part_tokens=part), [3])
    assert max(rollout.turns for rollout in group.rollouts) == 5
    check_exact(learner, [group], share_prefix=False)


def test_an_observation_reaches_the_policy(make) -> None:
    (group,) = run(make(iterations=1), [3], observation=" It is odd.")
    for rollout in group.rollouts:
        assert rollout.text.startswith(" It is odd.\nassistant\n") and not rollout.sampled[0]
        assert [m["role"] for m in rollout.messages] == ["environment", "assistant", "tool", "assistant"]
        assert rollout.messages[2]["content"] == "1 of 3"


def test_no_call_ends_the_episode(make) -> None:
    (group,) = run(make(parse=Parsed), [3])
    assert all(r.turns == 1 and r.stop_reason is StopReason.STOP and r.reward == 0 for r in group.rollouts)


@pytest.mark.parametrize("max_tokens", [14, 60, 120, 200])
def test_an_episode_never_exceeds_its_limit(make, max_tokens: int) -> None:
    (group,) = run(make(iterations=None, max_tokens=max_tokens), [3])
    for rollout in group.rollouts:
        assert len(rollout.token_ids) <= max_tokens and rollout.sampled[-1]
        assert rollout.stop_reason is StopReason.LENGTH
        assert rollout.tool_calls in (rollout.turns - 1, rollout.turns), "the last answer may not fit"


def test_an_observation_without_room_costs_its_rollout(make) -> None:
    (group,) = run(make(max_tokens=20), [3], observation="x" * 30)
    assert not group.rollouts and len(group.failures) == 4
    assert "leaves none of max_generated_tokens=20 to sample" in group.failures[0].reason


def malformed_at_first(text: str) -> Parsed:
    """Every turn holds an unreadable call and one of a tool that does not exist."""
    return Parsed("", (MalformedCall("Not JSON."), ToolCall("sing", {}), ToolCall("look", {})))


def test_a_malformed_call_is_answered(make) -> None:
    (group,) = run(make(parse=malformed_at_first, iterations=1), [3])
    for rollout in group.rollouts:
        assert (rollout.turns, rollout.tool_calls, rollout.tool_errors) == (2, 3, 2)
        parts = ["{'error': 'Not JSON.'}", "{'error': 'Tool sing not found.'}", "1 of 3"]
        places = [rollout.text.find(part) for part in parts]
        assert 0 < places[0] < places[1] < places[2]


def test_a_failed_environment_costs_its_rollout_and_no_other(make) -> None:
    agents = make(factory="envs.BadReset", iterations=1)
    (group,) = run(agents, [3], how="raise", index=1)
    assert not group.rollouts and group.failures == (FailedReward("environment", "raised ValueError: bad"),) * 4
    (group,) = run(agents, [3], how="raise", index=0)
    assert len(group.rollouts) == 4 and not group.failures


def test_a_turn_has_the_reward_that_the_environment_gives_it(make) -> None:
    agents = make(factory="envs.Stepper")
    (group,) = run(agents, [3])
    assert [list(rollout.turn_rewards) for rollout in group.rollouts] == [[0.5, 0.5, 0.0, 0.0, 0.0]] * 4
    for how, reason in (
        ("nan", "raised ValueError: get_turn_reward returned nan"),
        ("raise", "raised ValueError: bad"),
    ):
        (group,) = run(agents, [3], how=how)
        assert len(group.failures) == 4 and group.failures[0].reason.startswith(reason)


def test_a_run_of_evaluation_prompts(make) -> None:
    agents = make()
    prompts = [agents.prompt(number) for number in (3, 4, 5)]
    results = agents.worker.evaluate(prompts)
    assert [len(result.rollouts) for result in results] == [1, 1, 1]
    assert np.concatenate([r.versions for result in results for r in result.rollouts]).max() == 0
    assert always_look("").calls


class Poisoned:
    """An engine one of whose samples in the second turn has a log-prob that is not finite."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._calls = engine, 0

    def generate(self, requests: Any) -> Any:
        completions = self._engine.generate(requests)
        self._calls += 1
        if self._calls == 2:
            completions[0][0].logprobs[0] = np.nan
        return completions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_an_episode_with_a_log_prob_that_is_not_finite_leaves_its_group(
    folder: Path, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with agents(lambda: Poisoned(engine_of(learner)), folder) as made:
        (group,) = run(made, [3])
    assert len(group.rollouts) == 3 and not group.failures and len(group.bad_logprobs) == 1
    check_five_turns(group)
