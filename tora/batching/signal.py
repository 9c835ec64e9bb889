"""Which groups have a training signal, and how many others a step replaces: dynamic sampling (DAPO, Yu et al. 2025,
arXiv:2503.14476, eq. 11)."""

from __future__ import annotations

from tora.batching.advantage import differ
from tora.batching.batch import Regularizer
from tora.batching.turns import rewards_differ
from tora.config.schema import RunConfig
from tora.types import Group

_MAX_REFILLS = 3.0


def has_signal(group: Group, cfg: RunConfig) -> bool:
    """Whether the group's `rewards_differ`, and the scores of `rollout.refill_by` too if it names one; with
    `mask_truncated`, a group of truncated completions alone has none."""
    if cfg.mask_truncated and all(rollout.truncated for rollout in group.rollouts):
        return False
    by = cfg.rollout.refill_by
    return rewards_differ(group.rollouts, cfg.credit) and (
        by is None or differ([r.reward_parts[by] for r in group.rollouts])
    )


def regularizer_of(cfg: RunConfig) -> Regularizer:
    """Where a term acts that needs no advantage. By the config's keys: a loss of one's own whose class has a KL term by
    default must name `kl_coeff` there."""
    if cfg.loss.get("kl_coeff"):
        return cfg.loss.get("kl_in", "loss")
    return "loss" if cfg.loss.get("entropy_coeff") else "none"


def max_refills(cfg: RunConfig) -> int:
    """Groups without a signal that a step may replace: `rollout.max_refills` batches of them; by default 3, but none if
    a term acts on them, which has its effect on every prompt then."""
    share = cfg.rollout.max_refills
    if share is None:
        share = _MAX_REFILLS if regularizer_of(cfg) == "none" else 0
    return int(share * cfg.batch_size)
