"""Whether a group has a training signal: dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 11)."""

from __future__ import annotations

from tora.batching.advantage import differ
from tora.config.schema import RunConfig
from tora.types import Group


def has_signal(group: Group, cfg: RunConfig) -> bool:
    """Whether the group's rewards `differ`, those of `rollout.refill_by` too if it names one; with `mask_truncated`, a
    group of truncated completions alone has none."""
    if cfg.mask_truncated and all(rollout.truncated for rollout in group.rollouts):
        return False
    by = cfg.rollout.refill_by
    return differ([r.reward for r in group.rollouts]) and (
        by is None or differ([r.reward_parts[by] for r in group.rollouts])
    )
