"""One step's groups as a `TrainBatch`, with metrics of the rollout side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tora.batching.advantage import advantages
from tora.batching.batch import micro_batches
from tora.batching.signal import has_signal, regularizer_of
from tora.batching.turns import turn_advantages
from tora.config.parts import step_parts
from tora.config.schema import RunConfig
from tora.types import Group, Metrics, MicroBatch, StopReason, TrainBatch


def group_advantages(cfg: RunConfig, groups_P: Sequence[Group]) -> list[list[float]]:
    """The advantage of each group's rollouts, the mean of their tokens', before a KL penalty that is part of the
    reward."""
    if cfg.credit == "turn":
        each_P = [turn_advantages(group.rollouts, cfg.advantage, cfg.normalize_advantages) for group in groups_P]
        return [[float(advantages_S.mean()) for advantages_S in each_G] for each_G in each_P]
    sizes = [len(group.rollouts) for group in groups_P]
    rollouts = [rollout for group in groups_P for rollout in group.rollouts]
    if not rollouts:
        return [[] for _ in sizes]
    advantages_B = advantages(
        np.array([rollout.reward for rollout in rollouts], dtype=np.float64),
        np.repeat(np.arange(len(sizes)), sizes),
        np.array([rollout.num_sampled for rollout in rollouts], dtype=np.int64),
        cfg.advantage,
        cfg.normalize_advantages,
    )
    return [part.tolist() for part in np.split(advantages_B, np.cumsum(sizes)[:-1])]


def make_batch(
    cfg: RunConfig,
    groups_P: Sequence[Group],
    generated: Sequence[Group],
    drops: int,
    version: int,
    seconds: float,
    more: Metrics | None = None,
    *,
    first: int = 0,
) -> TrainBatch:
    """`groups_P`: the groups to train on; the first `first` are in parts already made, the batch has the others.
    `generated`: all groups since the last step, including those the filter dropped; reward metrics average over these,
    or over `groups_P` if there are none. `drops`: how many were dropped. `version`: the learner's. `seconds`: wall time
    since the last batch. `more`: further metrics.

    `staleness/*`, in versions, is that of a group's oldest token; `rollout/mixed_share` is the share of rollouts
    sampled by more than one policy version.
    """
    staleness_P = [version - group.version for group in groups_P]
    # empty if all of this step's groups arrived before the last step
    measured = [group for group in generated if group.rollouts] or groups_P
    rollouts = [r for group in measured for r in group.rollouts]
    metrics: Metrics = {
        **(more or {}),
        "staleness/mean": float(np.mean(staleness_P)),
        "staleness/max": float(max(staleness_P)),
        "rollout/signal_share": float(np.mean([has_signal(g, cfg) for g in measured])),
        "rollout/groups_dropped": float(drops),
        "rollout/tokens_per_s": sum(g.num_tokens for g in generated) / max(seconds, 1e-9),
        "rollout/length_mean": float(np.mean([r.num_sampled for r in rollouts])),
        "rollout/mixed_share": float(np.mean([r.versions[0] != r.versions[-1] for r in rollouts])),
        "rollout/kept_mass": float(np.mean([r.kept_mass for r in rollouts])),
        "rollout/truncated_share": float(np.mean([r.truncated for r in rollouts])),
        "rollout/stopped_share": float(np.mean([r.stop_reason is StopReason.STOP for r in rollouts])),
        "reward/mean": float(np.mean([r.reward for r in rollouts])),
    }
    if cfg.environment_factory is not None or cfg.tools or cfg.agent is not None:
        calls = sum(r.tool_calls for r in rollouts)
        metrics["rollout/turns_mean"] = float(np.mean([r.turns for r in rollouts]))
        metrics["rollout/tool_calls_mean"] = calls / len(rollouts)
        metrics["rollout/tool_error_share"] = sum(r.tool_errors for r in rollouts) / (calls or 1)
    failures = [failure for group in generated for failure in group.failures]
    metrics["reward/failed_share"] = len(failures) / (sum(g.num_left_out + len(g.rollouts) for g in generated) or 1)
    for name, number in Counter(failure.name for failure in failures).items():
        metrics[f"reward/failed/{name}"] = float(number)
    metrics["rollout/bad_logprobs"] = float(sum(len(group.bad_logprobs) for group in generated))
    for name in sorted({name for group in generated for name in group.logged}):
        logged = [value for group in generated for value in group.logged.get(name, ()) if math.isfinite(value)]
        metrics[f"logged/{name}"] = float(np.mean(logged)) if logged else math.nan
    for part in rollouts[0].reward_parts:
        metrics[f"reward/{part}"] = float(np.mean([r.reward_parts[part] for r in rollouts]))
    micro = _micro_batches(cfg, groups_P[first:], version, first)
    metrics["learner/tokens"] = _tokens(micro)
    return TrainBatch(micro, cfg.temperature, metrics, tuple(group.prompt.id for group in groups_P), tuple(groups_P))


def make_part(cfg: RunConfig, groups_P: Sequence[Group], version: int, first: int) -> TrainBatch:
    """Groups that a step trains on before it has all of them, after `first` others."""
    micro = _micro_batches(cfg, groups_P, version, first)
    ids = tuple(group.prompt.id for group in groups_P)
    return TrainBatch(micro, cfg.temperature, {}, ids, tuple(groups_P), is_last=False)


def joined(parts: Sequence[TrainBatch]) -> TrainBatch:
    """The batch of a whole step, whose last part has its metrics, prompts and groups."""
    micro = tuple(each for part in parts for each in part.micro_batches)
    return replace(parts[-1], micro_batches=micro, metrics={**parts[-1].metrics, "learner/tokens": _tokens(micro)})


def _tokens(micro: Sequence[MicroBatch]) -> float:
    return float(sum(len(m.tokens_T) for m in micro))


def _micro_batches(cfg: RunConfig, groups_P: Sequence[Group], version: int, first: int) -> tuple[MicroBatch, ...]:
    return micro_batches(
        groups_P,
        normalize_advantages=cfg.normalize_advantages,
        normalization=cfg.loss_normalization,
        max_generated_tokens=cfg.max_generated_tokens,
        capacity=cfg.micro_batch_tokens,
        num_ranks=cfg.learner_ranks,
        share_prefix=cfg.share_prefix,
        advantage=cfg.advantage,
        credit=cfg.credit,
        asked=cfg.batch_size * cfg.grpo_samples,
        regularizer=regularizer_of(cfg),
        mask_truncated=cfg.mask_truncated,
        num_mini_batches=cfg.num_mini_batches,
        seed=(cfg.seed, version),
        is_part=step_parts(cfg) > 1,
        first=first,
    )
