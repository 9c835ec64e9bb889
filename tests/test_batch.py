"""Groups to packed micro-batches."""

import numpy as np
import pytest
from fakes import make_group, make_prompt

from tora.batch import bins, micro_batches, token_weights


def make(capacity: int = 1000, normalization="token", groups=None):
    groups = groups or [make_group(make_prompt(i, length=3 + i), [0.0, 1.0, i / 2]) for i in range(3)]
    return groups, micro_batches(groups, normalize_advantages=False, normalization=normalization, capacity=capacity)


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
    groups, (x,) = make()
    by_sequence = {b: x.advantages_N[x.sequence_N == b] for b in range(len(x.lengths_B))}
    assert all(len(set(values.tolist())) == 1 for values in by_sequence.values())
    assert sum(float(v[0]) for v in by_sequence.values()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("capacity", [12, 30, 1000])
def test_weights_sum_to_one_however_it_is_cut(normalization, capacity) -> None:
    _, micro = make(capacity, normalization)
    assert sum(x.weights_N.sum() for x in micro) == pytest.approx(1, abs=1e-6)
    assert all(len(x.tokens_T) <= capacity or len(x.lengths_B) == 1 for x in micro)


def test_token_weights_by_hand() -> None:
    assert token_weights([2, 6], "token") == [1 / 8, 1 / 8]
    assert token_weights([2, 6], "sequence") == [1 / 4, 1 / 12]


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
