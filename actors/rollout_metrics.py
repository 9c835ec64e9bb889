"""Metrics of a sync."""

from __future__ import annotations

from collections.abc import Sequence

from tora.types import Metrics, SyncReport


def sync_metrics(reports: Sequence[SyncReport], seconds: float) -> Metrics:
    """`sync/seconds`: wall time until every worker that was up had installed the snapshot. `sync/bytes`: received by
    one worker. `sync/stall_ms`: the longest time that any engine's generation stalled."""
    metrics = {"sync/seconds": seconds, "sync/workers": float(len(reports))}
    if reports:
        metrics["sync/bytes"] = float(reports[0].nbytes)
        metrics["sync/modules"] = float(reports[0].num_modules)
        metrics["sync/stall_ms"] = max(report.stall_seconds for report in reports) * 1000
    return metrics
