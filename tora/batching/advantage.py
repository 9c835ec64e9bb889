"""Group-relative advantages (GRPO, Shao et al. 2024, section 4.1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_advantages(rewards_G: Sequence[float] | np.ndarray, normalize: bool) -> np.ndarray:
    """(r - mean) [/ std], float64 [G]; zero where all rewards are equal.

    The standard deviation is the sample's (n - 1), as in GRPO's reference code. `normalize=False` is Dr. GRPO's choice
    (Liu et al. 2025): the division favours prompts that are nearly always or never solved.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / rewards.std(ddof=1) if normalize else centred


def advantages_by_group(rewards_B: np.ndarray, groups_B: np.ndarray, normalize: bool) -> np.ndarray:
    """`group_advantages` of every group, float64 [B]; a group's sequences need not be neighbours."""
    advantages_B = np.zeros(len(rewards_B))
    for group in np.unique(groups_B):
        mine_B = groups_B == group
        advantages_B[mine_B] = group_advantages(rewards_B[mine_B], normalize)
    return advantages_B
