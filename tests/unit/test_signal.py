"""Which groups and rollouts are trained on, and the advantages they get.

Shape letters: G rollouts of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import make_group, make_prompt
from pools import config

from actors.group_filter import SignalFilter
from tora.batching.advantage import advantages, differ, group_advantages, leave_one_out_advantages
from tora.batching.batch import micro_batches, penalize
from tora.batching.signal import has_signal
from tora.batching.train_batch import make_batch
from tora.config.load import load_config
from tora.config.schema import RunConfig
from tora.errors import ConfigError
from tora.types import Group, MicroBatch, StopReason

SETTINGS: dict[str, Any] = {"normalize_advantages": True, "normalization": "token", "max_generated_tokens": 20}
ROUNDED = [0.1 + 0.2, 0.3, 0.3, 0.3]
JITTER = [1.0, 1.0 + 1e-9, 1.0, 1.0 - 1e-9]


def group(number: int, rewards: Sequence[float], stopped: Sequence[bool] = (), **parts: Sequence[float]) -> Group:
    made = make_group(make_prompt(number), rewards)
    rollouts = [
        replace(
            rollout,
            stop_reason=StopReason.LENGTH if stopped and not stopped[i] else StopReason.STOP,
            reward_parts={name: scores[i] for name, scores in parts.items()},
        )
        for i, rollout in enumerate(made.rollouts)
    ]
    return replace(made, rollouts=tuple(rollouts))


def advantages_of(micro: Sequence[MicroBatch]) -> dict[int, list[float]]:
    """By group, in the order of the sequences."""
    found: dict[int, list[float]] = {}
    for x in micro:
        for b, number in enumerate(x.groups_B):
            found.setdefault(int(number), []).append(float(x.advantages_N[x.sequence_N == b][0]))
    return found


@pytest.mark.parametrize("rewards", [ROUNDED, JITTER, [5e6 + 0.1 + 0.2, 5e6 + 0.3], [0.5] * 3, [2.0]])
def test_rewards_that_differ_by_rounding_alone_have_no_advantage(rewards: list[float]) -> None:
    for normalize in (True, False):
        assert not group_advantages(rewards, normalize).any()
    assert not leave_one_out_advantages(rewards).any()
    ones = np.ones(len(rewards))
    assert not advantages(np.array(rewards), 0 * ones, ones, "reinforce++", True).any()
    dropped = SignalFilter(config(0))
    assert len(rewards) == 1 or not dropped.admit(make_group(make_prompt(0), rewards))
    assert not micro_batches([make_group(make_prompt(0), rewards)], capacity=99, **SETTINGS)


@pytest.mark.parametrize("rewards", [[0.0, 1e-3], [1.0, 1.0, 1.00001], [-1e300, 1e300]])
def test_rewards_that_differ_are_a_signal(rewards: list[float]) -> None:
    assert differ(rewards) and np.isfinite(group_advantages(rewards, normalize=False)).all()
    assert SignalFilter(config(0)).admit(make_group(make_prompt(0), rewards))


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf, 1.0], [-math.inf, math.inf]])
def test_nothing_and_what_is_not_finite_is_no_signal(values: list[float]) -> None:
    assert not differ(values)
    if values:
        ones = np.ones(len(values))
        for kind in ("grpo", "rloo", "reinforce++"):
            found = advantages(np.array(values), 0 * ones, ones, kind, False)  # type: ignore[arg-type]
            assert np.isnan(found).any(), "a bad value shows in the loss, which leaves the step out"


def test_leave_one_out_by_hand() -> None:
    rewards = [1.0, 0.0, 0.5, 0.25]
    expected = [r - sum(rewards[:i] + rewards[i + 1 :]) / 3 for i, r in enumerate(rewards)]
    np.testing.assert_allclose(leave_one_out_advantages(rewards), expected)


def test_batch_normalised_advantages_equal_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(0)
    rewards, groups, lengths = rng.random(12), np.arange(12) % 3, rng.integers(1, 30, 12)
    rewards[groups == 1] = 0.7  # no signal: 0, and no part of the statistics
    means = {g: float(np.mean([r for r, h in zip(rewards, groups, strict=True) if h == g])) for g in (0, 2)}
    tokens = [rewards[b] - means[groups[b]] for b in range(12) if groups[b] != 1 for _ in range(lengths[b])]
    mean = sum(tokens) / len(tokens)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in tokens) / (len(tokens) - 1))
    found = advantages(rewards, groups, lengths, "reinforce++", True)
    for b in range(12):
        expected = 0.0 if groups[b] == 1 else (rewards[b] - means[groups[b]] - mean) / deviation
        assert found[b] == pytest.approx(expected, abs=1e-12)
    assert not advantages(np.ones(4), np.array([0, 0, 1, 1]), np.ones(4), "reinforce++", True).any()


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce++"])
def test_a_penalty_recomputes_the_advantages_of_the_same_kind(kind: Any) -> None:
    groups = [group(0, [0.0, 1.0, 0.5]), group(1, [1.0, 0.0, 0.0])]
    settings = {**SETTINGS, "normalize_advantages": kind != "rloo", "advantage": kind}
    plain = micro_batches(groups, capacity=18, **settings)
    assert len(plain) > 1
    count = sum(len(x.lengths_B) for x in plain)
    same = penalize(plain, np.zeros(count), kind, settings["normalize_advantages"])
    for before, after in zip(plain, same, strict=True):
        np.testing.assert_array_equal(before.advantages_N, after.advantages_N)
    levelled = penalize(plain, np.concatenate([x.rewards_B for x in plain]), kind, settings["normalize_advantages"])
    assert not any(x.advantages_N.any() for x in levelled)


def test_constant_divides_by_what_was_asked_for() -> None:
    """One of four groups is left: a token weighs as it would beside the other three."""
    groups = [group(i, [0.0, 1.0] if i == 2 else [1.0, 1.0]) for i in range(4)]
    constant = {**SETTINGS, "normalization": "constant", "asked": 8}
    (alone,) = micro_batches(groups, capacity=1000, **constant)
    assert (alone.weights_N == np.float32(1 / (8 * 20))).all()
    halves = micro_batches([group(i, [0.0, 1.0]) for i in range(4)], capacity=1000, num_mini_batches=2, **constant)
    assert all((half.weights_N == np.float32(1 / (4 * 20))).all() for half in halves) and len(halves) == 2


@pytest.mark.parametrize("regularizer", ["none", "loss", "reward"])
def test_a_truncated_completion_counts_in_the_mean_and_not_in_the_loss(regularizer: Any) -> None:
    stopped = [True, False, True, False]
    groups = [group(0, [0.0, 1.0, 0.5, 0.0], stopped), group(1, [0.0, 1.0], [False, False])]
    every = advantages_of(micro_batches(groups, capacity=1000, **SETTINGS))
    micro = micro_batches(groups, capacity=1000, mask_truncated=True, regularizer=regularizer, **SETTINGS)
    (x,) = micro
    assert set(x.groups_B) == {0}, "a group of truncated completions alone is left out"
    weights = [x.weights_N[x.sequence_N == b] for b in range(len(x.lengths_B))]
    assert sum(float(w.sum()) for w in weights) == pytest.approx(1)
    if regularizer == "reward":  # the others still set the mean after the penalty
        assert advantages_of(micro) == {0: every[0]}
        assert sorted(bool(w.all()) for w in weights) == [False, False, True, True]
    else:
        trained = {float(x.advantages_N[x.sequence_N == b][0]) for b in range(2)}
        assert len(weights) == 2 and trained == {every[0][i] for i in range(4) if _order(groups[0])[i]}


def _order(made: Group) -> list[bool]:
    """Whether each sequence, in the order of packing, stopped by itself: the longest first."""
    return [not r.truncated for r in sorted(made.rollouts, key=lambda r: -len(r.token_ids))]


def test_groups_without_signal_stay_if_another_term_acts_on_them() -> None:
    groups = [group(0, [1.0, 1.0]), group(1, [0.0, 1.0])]
    for regularizer in ("loss", "reward"):
        micro = micro_batches(groups, capacity=1000, regularizer=regularizer, **SETTINGS)  # type: ignore[arg-type]
        found = advantages_of(micro)
        assert found[0] == [0.0, 0.0] and all(found[1])
        assert sum(float(x.weights_N.sum()) for x in micro) == pytest.approx(1)
        penalized = advantages_of(penalize(micro, np.array([1.0, 2.0, 0.0, 0.0]), "grpo", True))
        assert all(found for found in penalized[0]), "a signal of the penalty alone"


def cfg_of(*overrides: str) -> RunConfig:
    return load_config("quickstart", ["batch_size=2", "grpo_samples=2", *overrides])


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        ([], {1}),
        (["loss.kl_coeff=0.01"], {0, 1}),
        (["loss.kl_coeff=0.01", "loss.kl_in=reward"], {0, 1}),
        (["loss.kl_coeff=0"], {1}),
    ],
)
def test_the_config_says_what_acts_on_a_group(overrides: list[str], trained: set[int]) -> None:
    groups = [group(0, [1.0, 1.0], accuracy=[1, 1]), group(1, [0.0, 1.0], accuracy=[0, 1])]
    batch = make_batch(cfg_of(*overrides), groups, [], 0, 0, 1.0)
    assert set(advantages_of(batch.micro_batches)) == trained


@pytest.mark.parametrize(
    ("overrides", "drops"),
    [
        ([], 6),
        (["rollout.max_refills=1"], 2),
        (["rollout.max_refills=0"], 0),
        (["loss.kl_coeff=0.01"], 0),
        (["loss.kl_coeff=0.01", "loss.kl_in=reward"], 0),
        (["loss.entropy_coeff=0.01"], 0),
        (["loss.kl_coeff=0.01", "rollout.max_refills=1"], 2),
    ],
)
def test_groups_with_equal_rewards_stay_where_a_kl_acts_on_them(overrides: list[str], drops: int) -> None:
    signal = SignalFilter(cfg_of(*overrides))
    admitted = [signal.admit(group(i, [1.0, 1.0])) for i in range(9)]
    assert admitted == [False] * drops + [True] * (9 - drops)


def test_dynamic_sampling_by_one_reward() -> None:
    """All answers are right, and their formats differ: nothing to learn for DAPO's filter."""
    cfg = cfg_of("rollout.refill_by=answer_tag")
    by_format = group(0, [1.0, 1.1], answer_tag=[1.0, 1.0], format=[0.0, 1.0])
    by_accuracy = group(1, [0.1, 1.0], answer_tag=[0.0, 1.0], format=[1.0, 0.0])
    cancelling = group(2, [1.0, 1.0], answer_tag=[0.0, 1.0], format=[10.0, 0.0])
    assert [has_signal(g, cfg) for g in (by_format, by_accuracy, cancelling)] == [False, True, False]
    assert has_signal(by_format, cfg_of())
    signal = SignalFilter(cfg)
    assert not signal.admit(by_format) and signal.admit(by_accuracy)
    batch = make_batch(cfg, [by_accuracy], [by_format, by_accuracy], 1, 0, 1.0)
    assert batch.metrics["rollout/signal_share"] == 0.5


def test_dynamic_sampling_replaces_groups_that_were_cut_off_entirely() -> None:
    cut = group(0, [0.0, 1.0], [False, False], fake=[0, 1])
    assert has_signal(cut, cfg_of()) and not has_signal(cut, cfg_of("mask_truncated=true"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.refill_by=acuracy"], r"rollout.refill_by=acuracy is not one of the rewards, which are \w+"),
        (["num_mini_batches=3"], "num_mini_batches=3 must be at most batch_size, which is 2"),
        (["advantage=rloo"], "advantage=rloo needs normalize_advantages=false"),
    ],
)
def test_settings_that_contradict_others(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cfg_of(*overrides)
