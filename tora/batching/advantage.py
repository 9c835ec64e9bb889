"""Group-relative advantages (GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

Shape letters: G rollouts of a group, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_advantages(rewards_G: Sequence[float] | np.ndarray, normalize: bool) -> np.ndarray:
    """r - mean, with `normalize` divided by the standard deviation; [G] float64. All zeros if all rewards are equal.

    The standard deviation is the sample's (n - 1), as in TRL's GRPO. Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) does
    not normalise, because the division gives more weight to prompts that are almost always or almost never solved.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / rewards.std(ddof=1) if normalize else centred


def advantages_by_group(rewards_B: np.ndarray, groups_B: np.ndarray, normalize: bool) -> np.ndarray:
    """`group_advantages` of every group, [B] float64. `groups_B`: the group of each sequence, in any order."""
    advantages_B = np.zeros(len(rewards_B))
    for group in np.unique(groups_B):
        members_B = groups_B == group
        advantages_B[members_B] = group_advantages(rewards_B[members_B], normalize)
    return advantages_B
