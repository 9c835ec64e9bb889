"""What local and asynchronous rollouts share: which prompts come next, which groups count, and the batch they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from actors.failures import FailedRewards
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
    """Drops groups whose rewards are all equal, up to a number a step, and remembers all that were generated.

    A group that failed rewards left with fewer than two rollouts is dropped in any case.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self._max_drops = int(cfg.rollout.max_refills * cfg.batch_size)
        self._failed = FailedRewards(cfg.max_failed_rewards, window=cfg.batch_size)
        self._drops = 0
        self._seen: list[Group] = []

    def keeps(self, group: Group) -> bool:
        """Errors: RolloutError where too many rewards fail."""
        self._seen.append(group)
        self._failed.add(group)
        if len(group.rollouts) < 2:
            return False
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
    # all of the step's groups may have been there already at the last one
    measured = [group for group in generated if group.rollouts] or groups_P
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
    failures = [failure for group in generated for failure in group.failures]
    metrics["reward/failed_share"] = len(failures) / (len(failures) + sum(len(g.rollouts) for g in generated) or 1)
    for name, number in Counter(failure.name for failure in failures).items():
        metrics[f"reward/failed/{name}"] = float(number)
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
    """Accuracy counts rollouts that earn 1 in the first reward part; one whose reward failed earns nothing."""
    answered = [(group.prompt, rollout) for group in groups_P for rollout in group.rollouts]
    correct = [next(iter(rollout.reward_parts.values())) >= 1 for _, rollout in answered]
    return EvalResult(
        accuracy=sum(correct) / len(groups_P),
        reward=sum(rollout.reward for _, rollout in answered) / len(groups_P),
        num_prompts=len(groups_P),
        sample=answered[0] if answered else None,
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
