"""Advantages from rewards, relative to a group of rollouts or to the batch.

Shape letters: G rollouts of a group, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tora.config.schema import Advantage

SIGNAL_EPSILON = 1e-6
"""Values that differ by less than this share of the largest magnitude, or of 1 if that is larger, count as equal: what
separates them is rounding, which a division by their standard deviation would turn into advantages of ±1."""


def differ(values: Sequence[float] | np.ndarray) -> bool:
    """Whether the values differ by more than `SIGNAL_EPSILON`. False for none, and if one is not finite."""
    numbers = np.asarray(values, dtype=np.float64).tolist()  # a group is too small for numpy to be faster
    if not numbers or not all(map(math.isfinite, numbers)):
        return False
    low, high = min(numbers), max(numbers)
    return high - low > SIGNAL_EPSILON * max(1.0, abs(low), abs(high))


def _level(rewards_G: np.ndarray) -> bool:
    """Whether the rewards are finite and do not `differ`. Rewards that are not finite must show in the advantages."""
    return not differ(rewards_G) and all(map(math.isfinite, rewards_G.tolist()))


def group_advantages(rewards_G: Sequence[float] | np.ndarray, normalize: bool) -> np.ndarray:
    """GRPO's (Shao et al. 2024, arXiv:2402.03300, section 4.1.2): r - mean, with `normalize` divided by the standard
    deviation; [G] float64. All zeros if the rewards do not `differ`, and NaN if one is not finite.

    The standard deviation is the sample's (n - 1), as in TRL's GRPO. Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) does
    not normalise, because the division gives more weight to prompts that are almost always or almost never solved.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if _level(rewards):
        return np.zeros_like(rewards)
    with np.errstate(invalid="ignore"):  # what is not finite is reported as a bad step
        centred = rewards - rewards.mean()
    return centred / rewards.std(ddof=1) if normalize else centred


def leave_one_out_advantages(rewards_G: Sequence[float] | np.ndarray) -> np.ndarray:
    """RLOO's (Ahmadian et al. 2024, arXiv:2402.14740): r minus the mean of the group's other rewards, [G] float64. That
    is G / (G - 1) times r - mean. All zeros if the rewards do not `differ`."""
    count = len(rewards_G)
    return group_advantages(rewards_G, normalize=False) * (count / max(count - 1, 1))


def batch_advantages(rewards_B: np.ndarray, groups_B: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    """REINFORCE++'s with a baseline (Hu et al. 2025, arXiv:2501.03262, "REINFORCE++ w/ Baseline"): r minus its group's
    mean, then minus the mean and divided by the standard deviation over all the batch's tokens; [B] float64.

    The deviation is the sample's. Groups whose rewards do not `differ` get 0 and are left out of both statistics.
    """
    centred_B = _by_group(rewards_B, groups_B, lambda rewards_G: group_advantages(rewards_G, normalize=False))
    live_B = _by_group(rewards_B, groups_B, lambda rewards_G: np.full(len(rewards_G), not _level(rewards_G))) > 0
    if not live_B.any():
        return centred_B
    centred, lengths = centred_B[live_B], lengths_B[live_B].astype(np.float64)
    mean = np.average(centred, weights=lengths)
    variance = (lengths * (centred - mean) ** 2).sum() / (lengths.sum() - 1)
    centred_B[live_B] = (centred - mean) / np.sqrt(variance)
    return centred_B


def advantages(
    rewards_B: np.ndarray, groups_B: np.ndarray, lengths_B: np.ndarray, kind: Advantage, normalize: bool
) -> np.ndarray:
    """Of all the step's sequences, [B] float64. `groups_B`: the group of each sequence, in any order; `lengths_B`: its
    response tokens. `normalize` is read by `grpo` alone."""
    if kind == "reinforce++":
        return batch_advantages(rewards_B, groups_B, lengths_B)
    if kind == "rloo":
        return _by_group(rewards_B, groups_B, leave_one_out_advantages)
    return _by_group(rewards_B, groups_B, lambda rewards_G: group_advantages(rewards_G, normalize))


def _by_group(
    rewards_B: np.ndarray, groups_B: np.ndarray, advantages_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    advantages_B = np.zeros(len(rewards_B))
    for group in np.unique(groups_B):
        members_B = groups_B == group
        advantages_B[members_B] = advantages_of(rewards_B[members_B])
    return advantages_B
