"""Groups to packed micro-batches."""

import math
from dataclasses import replace

import numpy as np
import pytest
from fakes import make_group, make_prompt

from tora.batching.advantage import advantages, group_advantages
from tora.batching.batch import micro_batches, penalize, token_weights
from tora.batching.packing import bins
from tora.types import Group, Rollout


def test_advantages_by_hand() -> None:
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1], normalize=False), [0.5, -0.5, -0.5, 0.5])
    std = math.sqrt(4 * 0.25 / 3)
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1], normalize=True), np.array([0.5, -0.5, -0.5, 0.5]) / std)
    assert not group_advantages([0.1] * 7, normalize=True).any(), "equal rewards give advantages of zero, not of 1e8"


def masked(group: Group, seed: int) -> Group:
    """The group with some tokens that were not sampled, the first or the last among them."""
    rng = np.random.default_rng(seed)

    def mask(rollout: Rollout) -> Rollout:
        sampled = rng.random(len(rollout.token_ids)) < 0.5
        sampled[1] = True
        kept = {name: getattr(rollout, name)[sampled] for name in ("actor_logprobs", "versions")}
        return replace(rollout, sampled=sampled, **kept)

    return replace(group, rollouts=tuple(map(mask, group.rollouts)))


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("capacity", [12, 30, 1000])
def test_only_sampled_tokens_are_response_tokens(share_prefix: bool, capacity: int) -> None:
    """Each is predicted by the position before it, and each sequence weighs what its sampled tokens alone would."""
    groups = [masked(make_group(make_prompt(i, length=3 + i), [0.0, 1.0, i / 2], length=6), i) for i in range(3)]
    settings = {"normalize_advantages": False, "normalization": "sequence", "max_generated_tokens": 20}
    micro = micro_batches(groups, capacity=capacity, share_prefix=share_prefix, **settings)
    expected = sorted((i, r.reward, tuple(r.token_ids[r.sampled])) for i, g in enumerate(groups) for r in g.rollouts)
    found = []
    for x in micro:
        assert len(x.targets_N) == len(x.actor_logprobs_N) == len(x.versions_N) == len(x.weights_N)
        for position, target in zip(x.response_N, x.targets_N, strict=True):
            ends_shared_prompt = position < x.prompt_lengths_P.sum()
            assert ends_shared_prompt or x.tokens_T[position + 1] == target
        for b, (group, reward) in enumerate(zip(x.groups_B, x.rewards_B, strict=True)):
            mine = x.sequence_N == b
            found.append((group, reward, tuple(x.targets_N[mine])))
            np.testing.assert_allclose(x.weights_N[mine], 1 / (9 * mine.sum()), rtol=1e-6)
    assert sorted(found) == expected


def make(capacity: int = 1000, normalization="token", groups=None):
    groups = groups or [make_group(make_prompt(i, length=3 + i), [0.0, 1.0, i / 2]) for i in range(3)]
    settings = {"normalize_advantages": False, "normalization": normalization, "max_generated_tokens": 20}
    return groups, micro_batches(groups, capacity=capacity, **settings)


def test_every_response_token_is_predicted_by_the_position_before_it() -> None:
    groups, micro = make()
    assert len(micro) == 1
    x = micro[0]
    assert x.lengths_B.sum() == len(x.tokens_T)
    np.testing.assert_array_equal(x.tokens_T[x.response_N + 1], x.targets_N)
    starts = np.cumsum(x.lengths_B) - x.lengths_B
    seen = set()
    for b, start in enumerate(starts):
        tokens = x.tokens_T[start : start + x.lengths_B[b]]
        mine = x.sequence_N == b
        rollout_tokens = tuple(x.targets_N[mine])
        assert tuple(tokens[-len(rollout_tokens) :]) == rollout_tokens
        seen.add((tuple(tokens[: -len(rollout_tokens)]), rollout_tokens))
    assert seen == {(g.prompt.token_ids, tuple(r.token_ids)) for g in groups for r in g.rollouts}


def test_advantages_follow_their_sequences_and_sum_to_zero_in_each_group() -> None:
    _, (x,) = make()
    by_sequence = {b: x.advantages_N[x.sequence_N == b] for b in range(len(x.lengths_B))}
    assert all(len(set(values.tolist())) == 1 for values in by_sequence.values())
    assert sum(float(v[0]) for v in by_sequence.values()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("capacity", [12, 30, 1000])
def test_weights_sum_to_one_however_the_batch_is_split(normalization, capacity) -> None:
    _, micro = make(capacity, normalization)
    assert sum(x.weights_N.sum() for x in micro) == pytest.approx(1, abs=1e-6)
    assert all(len(x.tokens_T) <= capacity or len(x.lengths_B) == 1 for x in micro)


def test_token_weights_by_hand() -> None:
    assert token_weights([2, 6], "token", 10) == [1 / 8, 1 / 8]
    assert token_weights([2, 6], "sequence", 10) == [1 / 4, 1 / 12]
    assert token_weights([2, 6], "constant", 10) == [1 / 20, 1 / 20]


def test_constant_weights_do_not_depend_on_the_lengths() -> None:
    _, micro = make(30, "constant")
    assert all((x.weights_N == np.float32(1 / (9 * 20))).all() for x in micro)


def test_sequences_know_their_reward_and_group_however_the_batch_is_split() -> None:
    groups, micro = make(30)
    assert len(micro) > 1
    found = sorted((g, r) for x in micro for g, r in zip(x.groups_B, x.rewards_B, strict=True))
    assert found == sorted((i, r.reward) for i, group in enumerate(groups) for r in group.rollouts)


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_by_group_separate_the_groups(normalize) -> None:
    rewards, groups = np.array([1.0, 5.0, 0.0, 5.0, 0.5, 3.0]), np.array([7, 2, 7, 2, 7, 2])
    found = advantages(rewards, groups, np.ones(6), "grpo", normalize)
    for group in (2, 7):
        np.testing.assert_array_equal(found[groups == group], group_advantages(rewards[groups == group], normalize))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("capacity", [12, 30, 1000])
def test_a_penalty_comes_off_the_reward_before_the_advantages(capacity, normalize) -> None:
    settings = {"normalize_advantages": normalize, "normalization": "token", "max_generated_tokens": 20}
    groups = make()[0]
    micro = micro_batches(groups, capacity=capacity, **settings)
    count = sum(len(x.lengths_B) for x in micro)
    for before, after in zip(micro, penalize(micro, np.zeros(count), "grpo", normalize), strict=True):
        np.testing.assert_array_equal(before.advantages_N, after.advantages_N, strict=True)

    penalties = np.random.default_rng(0).random(count)
    after = penalize(micro, penalties, "grpo", normalize)
    members: dict[int, list[tuple[float, float]]] = {}
    places = [(x, b) for x in after for b in range(len(x.lengths_B))]
    for (x, b), penalty in zip(places, penalties, strict=True):
        advantage = float(x.advantages_N[x.sequence_N == b][0])
        members.setdefault(int(x.groups_B[b]), []).append((float(x.rewards_B[b]) - penalty, advantage))
    for pairs in members.values():
        mean = sum(r for r, _ in pairs) / len(pairs)
        variance = sum((r - mean) ** 2 for r, _ in pairs) / (len(pairs) - 1)
        for reward, advantage in pairs:
            expected = (reward - mean) / (variance**0.5 if normalize else 1)
            assert advantage == pytest.approx(expected, rel=1e-6)


def test_groups_without_signal_carry_no_tokens() -> None:
    groups = [make_group(make_prompt(0), [1.0, 1.0]), make_group(make_prompt(1), [0.0, 1.0])]
    _, micro = make(groups=groups)
    assert sum(len(x.lengths_B) for x in micro) == 2
    assert make(groups=groups[:1])[1] == ()


def test_bins_keep_everything_once_within_capacity() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 60, size=rng.integers(1, 40)).tolist()
        packed = bins(lengths, 64)
        assert sorted(i for b in packed for i in b) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in b) <= 64 for b in packed)
        assert len(packed) <= 2 * -(-sum(lengths) // 64)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_an_image_is_in_a_micro_batch_once_however_many_sequences_show_it(share_prefix: bool) -> None:
    shown = [(b"cat",), (), (b"dog", b"cat")]
    prompts = [replace(make_prompt(i), images=images) for i, images in enumerate(shown)]
    groups = [make_group(prompt, [0.0, 1.0]) for prompt in prompts]
    settings = {"normalize_advantages": False, "normalization": "token", "max_generated_tokens": 20}
    (x,) = micro_batches(groups, capacity=1000, share_prefix=share_prefix, **settings)
    assert sorted(x.images) == [b"cat", b"dog"]
    in_order = [groups[i].prompt for i in (dict.fromkeys(x.groups_B) if share_prefix else x.groups_B)]
    assert [x.images[i] for i in x.image_I] == [image for prompt in in_order for image in prompt.images]


@pytest.mark.parametrize(("prompt", "completion", "shared"), [(64, 32, True), (32, 64, True), (8, 64, False)])
def test_prompts_are_shared_where_that_saves_a_fifth_of_the_tokens(prompt: int, completion: int, shared: bool) -> None:
    groups = [make_group(make_prompt(i, length=prompt), [0.0, 1.0] * 4, length=completion) for i in range(2)]
    settings = {"normalize_advantages": True, "normalization": "token", "max_generated_tokens": 100}
    micro = micro_batches(groups, capacity=10_000, share_prefix=None, **settings)
    explicit = micro_batches(groups, capacity=10_000, share_prefix=shared, **settings)
    assert [len(m.tokens_T) for m in micro] == [len(m.tokens_T) for m in explicit]
    assert (len(micro[0].prompt_lengths_P) > 0) == shared
