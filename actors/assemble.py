"""What local and asynchronous rollouts share: which prompts come next, which groups count, and the batch they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tora.batch import micro_batches
from tora.config import RunConfig
from tora.types import EvalResult, Group, Metrics, Prompt, RolloutState, SyncReport, TrainBatch


class PromptCursor:
    """Prompts in the stream's order, those of an interrupted run first."""

    def __init__(self, prompt_at: Callable[[int], Prompt], state: RolloutState) -> None:
        self._prompt_at = prompt_at
        self.position = state.cursor
        self._again = list(state.pending)

    def next(self) -> Prompt:
        if self._again:
            return self._prompt_at(self._again.pop(0))
        self.position += 1
        return self._prompt_at(self.position - 1)

    def state(self, in_flight: Iterable[int], finished: Sequence[tuple[int, Group]] = ()) -> RolloutState:
        return RolloutState(self.position, sorted([*self._again, *in_flight]), list(finished))


class SignalFilter:
    """Drops groups whose rewards are all equal, up to a number a step, and remembers all that were generated."""

    def __init__(self, max_drops: int) -> None:
        self._max_drops = max_drops
        self._drops = 0
        self._seen: list[Group] = []

    def keeps(self, group: Group) -> bool:
        self._seen.append(group)
        if group.has_signal or self._drops >= self._max_drops:
            return True
        self._drops += 1
        return False

    def take(self) -> tuple[list[Group], int]:
        """Groups generated and groups dropped since the last call."""
        seen, drops = self._seen, self._drops
        self._seen, self._drops = [], 0
        return seen, drops


def make_batch(
    cfg: RunConfig, groups_P: Sequence[Group], generated: Sequence[Group], drops: int, version: int, seconds: float
) -> TrainBatch:
    """`generated` are all groups since the last step, dropped ones too: rewards are averaged over them, not over what
    the filter left, unless there are none. `seconds`: wall time since the last batch. `staleness/*`: of a group's
    oldest token; `rollout/mixed_share`: of rollouts sampled by more than one policy version."""
    staleness_P = [version - group.version for group in groups_P]
    measured = generated or groups_P  # all of the step's groups may have been there already at the last one
    rollouts = [r for group in measured for r in group.rollouts]
    metrics: Metrics = {
        "staleness/mean": float(np.mean(staleness_P)),
        "staleness/max": float(max(staleness_P)),
        "rollout/signal_share": float(np.mean([g.has_signal for g in measured])),
        "rollout/groups_dropped": float(drops),
        "rollout/tokens_per_s": sum(g.num_tokens for g in generated) / max(seconds, 1e-9),
        "rollout/length_mean": float(np.mean([len(r.token_ids) for r in rollouts])),
        "rollout/mixed_share": float(np.mean([r.versions[0] != r.versions[-1] for r in rollouts])),
        "rollout/stopped_share": float(np.mean([r.stopped for r in rollouts])),
        "reward/mean": float(np.mean([r.reward for r in rollouts])),
    }
    for part in rollouts[0].reward_parts:
        metrics[f"reward/{part}"] = float(np.mean([r.reward_parts[part] for r in rollouts]))
    micro = micro_batches(
        groups_P,
        normalize_advantages=cfg.normalize_advantages,
        normalization=cfg.loss_normalization,
        max_generated_tokens=cfg.max_generated_tokens,
        capacity=cfg.micro_batch_tokens,
        num_ranks=cfg.learner_ranks,
        share_prefix=cfg.share_prefix,
    )
    metrics["learner/tokens"] = float(sum(len(m.tokens_T) for m in micro))
    return TrainBatch(micro, cfg.temperature, metrics, tuple(group.prompt.id for group in groups_P))


def summarize_evaluation(groups_P: Sequence[Group]) -> EvalResult:
    """Accuracy counts rollouts that earn 1 in the first reward part."""
    rollouts = [group.rollouts[0] for group in groups_P]
    correct = [next(iter(r.reward_parts.values())) >= 1 for r in rollouts]
    return EvalResult(
        accuracy=float(np.mean(correct)),
        reward=float(np.mean([r.reward for r in rollouts])),
        num_prompts=len(groups_P),
        sample=(groups_P[0].prompt, rollouts[0]) if groups_P else None,
    )


def sync_metrics(reports: Sequence[SyncReport], seconds: float) -> Metrics:
    """`sync/bytes` is what one worker received; `sync/seconds` the wall time until all had it that were up;
    `sync/stall_ms` the longest that an engine's generation stood still for it."""
    metrics = {"sync/seconds": seconds, "sync/workers": float(len(reports))}
    if reports:
        metrics["sync/bytes"] = float(reports[0].nbytes)
        metrics["sync/modules"] = float(reports[0].num_modules)
        metrics["sync/stall_ms"] = max(report.stall_seconds for report in reports) * 1000
    return metrics
