"""Metrics of a sync and of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from tora.types import EvalResult, Group, Metrics, SyncReport


def summarize_evaluation(groups_P: Sequence[Group]) -> EvalResult:
    """One rollout per prompt. Accuracy: share that earns 1 in the first reward part. A rollout left out counts as 0."""
    answered = [(group.prompt, rollout) for group in groups_P for rollout in group.rollouts]
    correct = [next(iter(rollout.reward_parts.values())) >= 1 for _, rollout in answered]
    return EvalResult(
        accuracy=sum(correct) / len(groups_P),
        reward=sum(rollout.reward for _, rollout in answered) / len(groups_P),
        num_prompts=len(groups_P),
        sample=answered[0] if answered else None,
    )


def sync_metrics(reports: Sequence[SyncReport], seconds: float) -> Metrics:
    """`sync/seconds`: wall time until every worker that was up had installed the snapshot. `sync/bytes`: received by
    one worker. `sync/stall_ms`: the longest time that any engine's generation stalled."""
    metrics = {"sync/seconds": seconds, "sync/workers": float(len(reports))}
    if reports:
        metrics["sync/bytes"] = float(reports[0].nbytes)
        metrics["sync/modules"] = float(reports[0].num_modules)
        metrics["sync/stall_ms"] = max(report.stall_seconds for report in reports) * 1000
    return metrics
