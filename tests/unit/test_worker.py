"""RolloutWorker: what crosses the process boundary."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes import make_prompt

from actors.worker import RolloutWorker
from tora.reporting.evaluation import summarize
from tora.rewards.rewarder import FunctionRewarder
from tora.types import BadLogprob, Completion, GroupResult, Prompt, SampleRequest, Sampling

IMAGE, SOURCE, ANSWER = b"PNG of a cat", "is it a cat?", "a secret answer"
PROMPT = Prompt(0, (123_456_789, 5), SOURCE, {"answer": ANSWER}, (IMAGE,))


def one_token(token_id: int, version: int = 0) -> Completion:
    logprobs = np.zeros(1, np.float32)
    return Completion(np.full(1, token_id), logprobs, logprobs, np.full(1, version), stopped=True)


class OneTokenEngine:
    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        return [[one_token(1, version=7)] * request.num_samples for request in requests]


class Words:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "yes"


def length(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    assert columns["answer"] == [ANSWER] * len(completions)
    return [float(len(text)) for text in completions]


def make_worker(engine: Any = None, weight: float = 2.0) -> RolloutWorker:
    engine = engine or OneTokenEngine()
    sampling = Sampling(1)
    return RolloutWorker(
        lambda: engine,
        lambda: FunctionRewarder((("length", length, weight),)),
        Words(),
        sampling=sampling,
        eval_sampling=sampling,
        group_size=3,
        seed=0,
    )


def test_a_result_contains_nothing_of_its_prompt() -> None:
    worker = make_worker()
    answers: list[GroupResult] = [worker.run_group(PROMPT), *worker.run_groups([PROMPT]), *worker.evaluate([PROMPT])]
    assert [len(answer.rollouts) for answer in answers] == [3, 3, 1]
    sent = pickle.dumps(answers)
    for held_back in (IMAGE, SOURCE.encode(), ANSWER.encode(), (123_456_789).to_bytes(4, "little"), b"Prompt"):
        assert held_back in pickle.dumps(PROMPT), "the check would see it"
        assert held_back not in sent


def test_the_pool_attaches_the_prompt() -> None:
    result = make_worker().run_group(PROMPT)
    group = result.with_prompt(PROMPT)
    assert (group.prompt, group.rollouts, group.failures) == (PROMPT, result.rollouts, ())
    assert group.seconds == result.seconds > 0
    assert [(r.text, r.reward, r.versions.tolist()) for r in group.rollouts] == [("yes", 6.0, [7])] * 3


def test_results_keep_the_order_of_their_prompts() -> None:
    prompts = [make_prompt(i) for i in range(4)]

    class Numbered(OneTokenEngine):
        def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
            return [[one_token(i)] * r.num_samples for i, r in enumerate(requests)]

    engine: Any = Numbered()
    worker = RolloutWorker(
        lambda: engine,
        lambda: FunctionRewarder((("one", lambda completions, **columns: [1.0] * len(completions), 1.0),)),
        Words(),
        sampling=Sampling(1),
        eval_sampling=Sampling(1),
        group_size=2,
        seed=0,
    )
    for results, size in ((worker.run_groups(prompts), 2), (worker.evaluate(prompts), 1)):
        assert [[int(r.token_ids[0]) for r in result.rollouts] for result in results] == [[i] * size for i in range(4)]


class BadLogprobs(OneTokenEngine):
    """The log-probs of each completion of a group, by the policy and by the distribution drawn from."""

    def __init__(self, policy: Sequence[list[float]], drawn: Sequence[list[float]]) -> None:
        self.completions = [
            Completion(np.arange(3), np.array(p, np.float32), np.array(d, np.float32), np.full(3, 7), True)
            for p, d in zip(policy, drawn, strict=True)
        ]

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        return [self.completions[: request.num_samples] for request in requests]


GOOD = [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("in_policy", [True, False])
def test_a_rollout_with_a_bad_logprob_leaves_its_group_and_is_described(value: float, in_policy: bool) -> None:
    bad = [-1.0, value, value]
    policy, drawn = [GOOD, bad if in_policy else GOOD, GOOD], [GOOD, GOOD if in_policy else bad, GOOD]
    worker = make_worker(BadLogprobs(policy, drawn))
    (result,) = worker.run_groups([PROMPT])
    assert len(result.rollouts) == 2 and all(np.isfinite(r.actor_logprobs).all() for r in result.rollouts)
    assert repr(result.bad_logprobs) == repr((BadLogprob(1, float(value), 7),))
    group = result.with_prompt(PROMPT)
    assert (group.bad_logprobs, group.num_left_out, group.failures) == (result.bad_logprobs, 1, ())


def test_a_group_may_lose_all_its_rollouts_in_training_and_evaluation() -> None:
    bad = [[np.nan, -1.0, -1.0]] * 3
    worker = make_worker(BadLogprobs(bad, bad))
    result = worker.run_group(PROMPT)
    assert result.rollouts == result.failures == () and len(result.bad_logprobs) == 3
    (evaluated,) = worker.evaluate([PROMPT])
    assert summarize([evaluated.with_prompt(PROMPT)], 1, None).reward == 0


def test_scores_whose_weighted_sum_overflows_are_a_failed_reward() -> None:
    result = make_worker(weight=1e308).run_group(PROMPT)  # times 3, the length of "yes"
    assert result.rollouts == ()
    assert [(f.name, f.reason) for f in result.failures] == [("weighted_sum", "is inf, of the scores length 3")] * 3
    assert result.with_prompt(PROMPT).num_left_out == 3
