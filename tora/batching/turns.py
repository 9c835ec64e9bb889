"""Credit for turns: each turn of an episode is compared with the same turn of its group's other episodes.

The return of turn t is the reward that is still to come: R plus the sum of r_k over k >= t, with R the episode's reward
and r_k what turn k earned (`Rollout.turn_rewards`). Its advantage is taken among the returns of turn t of all of the
group's episodes that have one; a turn that no other episode reached has 0.

Shape letters: G rollouts of a group, U turns of a rollout, S its sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tora.batching.advantage import differ, group_advantages, leave_one_out_advantages
from tora.config.schema import Advantage, Credit
from tora.types import Rollout


def returns(rollout: Rollout) -> np.ndarray:
    """[U] float64."""
    earned_U = np.zeros(rollout.turns)
    earned_U[: len(rollout.turn_rewards)] = rollout.turn_rewards
    return rollout.reward + np.cumsum(earned_U[::-1])[::-1]


def turn_of_tokens(rollout: Rollout) -> np.ndarray:
    """[S] int64: the turn of each sampled token. An environment's tokens are between any two turns."""
    begins = rollout.sampled & ~np.concatenate([[False], rollout.sampled[:-1]])
    return np.cumsum(begins)[rollout.sampled] - 1


def turn_advantages(rollouts_G: Sequence[Rollout], kind: Advantage, normalize: bool) -> list[np.ndarray]:
    """Of each rollout's tokens, [S] float64. `kind` is `grpo` or `rloo`; `normalize` is read by `grpo` alone."""
    assert kind != "reinforce++", "its statistics are those of the batch"
    returns_G = [returns(rollout) for rollout in rollouts_G]
    by_turn_G = [np.zeros(len(returns_U)) for returns_U in returns_G]
    for turn in range(max(map(len, returns_G), default=0)):
        having = [g for g, returns_U in enumerate(returns_G) if len(returns_U) > turn]
        values = [returns_G[g][turn] for g in having]
        advantages = leave_one_out_advantages(values) if kind == "rloo" else group_advantages(values, normalize)
        for g, advantage in zip(having, advantages, strict=True):
            by_turn_G[g][turn] = advantage
    return [by_turn_U[turn_of_tokens(r)] for by_turn_U, r in zip(by_turn_G, rollouts_G, strict=True)]


def rewards_differ(rollouts_G: Sequence[Rollout], credit: Credit) -> bool:
    """Whether a group has a contrast to learn from: its rewards `differ`, or with `turn` the returns of one of its
    turns."""
    if differ([rollout.reward for rollout in rollouts_G]):
        return True
    if credit == "episode":
        return False
    return any(advantages_S.any() for advantages_S in turn_advantages(rollouts_G, "grpo", normalize=False))
