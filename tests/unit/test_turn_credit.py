"""`credit=turn`: the advantage of each turn, by a formula written out anew, and where it ends up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import make_group, make_prompt
from pools import config

from tora.batching.batch import micro_batches
from tora.batching.signal import has_signal
from tora.batching.train_batch import group_advantages
from tora.batching.turns import returns, rewards_differ, turn_advantages, turn_of_tokens
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.types import Group, Rollout


def episode(rollout: Rollout, reward: float, earned: list[float], lengths: list[int]) -> Rollout:
    """Turns of `lengths` tokens, with two tokens of the environment's before each."""
    sampled = np.concatenate([[False] * 2 + [True] * length for length in lengths])
    count = int(sampled.sum())
    return replace(
        rollout,
        token_ids=np.arange(len(sampled)),
        sampled=sampled,
        actor_logprobs=np.zeros(count, np.float32),
        versions=np.zeros(count, np.int64),
        reward=reward,
        turns=len(lengths),
        turn_rewards=earned,
    )


def group(*episodes: tuple[float, list[float], list[int]]) -> Group:
    made = make_group(make_prompt(0), [0.0] * len(episodes))
    rollouts = [episode(r, *values) for r, values in zip(made.rollouts, episodes, strict=True)]
    return replace(made, rollouts=tuple(rollouts))


MIXED = group((1.0, [0.5, 0.0], [3, 1]), (0.0, [0.0, -1.0, 0.0], [1, 2, 4]), (0.0, [], [2]))


def test_a_return_is_what_is_still_to_come() -> None:
    one, two, three = (returns(r).tolist() for r in MIXED.rollouts)
    assert (one, two, three) == ([1.5, 1.0], [-1.0, -1.0, 0.0], [0.0])
    assert turn_of_tokens(MIXED.rollouts[1]).tolist() == [0, 1, 1, 2, 2, 2, 2]


def test_a_turn_is_compared_with_the_same_turn_of_the_others() -> None:
    first, second = np.array([1.5, -1.0, 0.0]), np.array([1.0, -1.0])
    plain = turn_advantages(MIXED.rollouts, "grpo", normalize=False)
    a, b = first - first.mean(), second - second.mean()
    expected = [[a[0]] * 3 + [b[0]], [a[1], b[1], b[1], 0, 0, 0, 0], [a[2]] * 2]
    for found, wanted in zip(plain, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    scaled = turn_advantages(MIXED.rollouts, "grpo", normalize=True)
    np.testing.assert_allclose(scaled[0], [a[0] / first.std(ddof=1)] * 3 + [b[0] / second.std(ddof=1)], atol=1e-12)
    others = turn_advantages(MIXED.rollouts, "rloo", normalize=False)
    np.testing.assert_allclose(others[0], [1.5 - (-1.0 + 0.0) / 2] * 3 + [1.0 + 1.0], atol=1e-12)
    assert turn_advantages([], "grpo", normalize=True) == []


def test_a_single_turn_has_the_episodes_advantage() -> None:
    single = group((1.0, [], [3]), (0.0, [0.0], [1]), (0.5, [], [2]))
    by_turn = turn_advantages(single.rollouts, "grpo", normalize=True)
    of_episode = np.array([0.5, -0.5, 0.0]) / np.std([1, 0, 0.5], ddof=1)
    assert [a.tolist() for a in by_turn] == [[pytest.approx(v)] * n for v, n in zip(of_episode, (3, 1, 2), strict=True)]


def test_a_reward_that_is_not_finite_shows() -> None:
    bad = group((float("nan"), [0.0], [1]), (0.0, [0.0], [1]))
    assert all(np.isnan(a).all() for a in turn_advantages(bad.rollouts, "grpo", normalize=False))


def test_turn_rewards_are_a_signal_where_rewards_are_equal() -> None:
    level = group((1.0, [0.5, 0.0], [3, 1]), (1.0, [0.0, 0.0], [1, 2]))
    cfg = config(0)
    assert not has_signal(level, cfg) and not rewards_differ(level.rollouts, "episode")
    by_turn = replace(cfg, credit="turn")
    assert has_signal(level, by_turn)
    assert not has_signal(group((1.0, [0.5, 0.0], [3, 1]), (1.0, [0.5, 0.0], [1, 2])), by_turn)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_each_token_gets_its_turns_advantage(share_prefix: bool) -> None:
    settings = {
        "normalize_advantages": False,
        "normalization": "token",
        "max_generated_tokens": 20,
        "capacity": 1 << 20,
    }
    (micro,) = micro_batches([MIXED], credit="turn", share_prefix=share_prefix, **settings)
    expected = turn_advantages(MIXED.rollouts, "grpo", normalize=False)
    for b in range(3):
        chosen = micro.sequence_N == b
        match = [e for e in expected if len(e) == chosen.sum()]
        np.testing.assert_allclose(micro.advantages_N[chosen], match[0], rtol=1e-6)
    cfg = replace(config(0), credit="turn", normalize_advantages=False)
    assert group_advantages(cfg, [MIXED]) == [pytest.approx([e.mean() for e in expected])]


@pytest.mark.parametrize(
    ("config_name", "overrides", "message"),
    [
        ("quickstart", [], "credit=turn needs environment_factory"),
        ("quickstart_guess", ["advantage=reinforce++"], r"reinforce\+\+ compares whole rollouts"),
        ("quickstart_guess", ["loss.kl_coeff=0.1", "loss.kl_in=reward"], "credit=turn needs loss.kl_in=loss"),
    ],
)
def test_what_does_not_go_with_it_is_refused(config_name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_name, ["credit=turn", *overrides])
