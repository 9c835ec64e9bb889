"""Checks on the files of a run that lost a process."""

from __future__ import annotations

import json
from pathlib import Path

from runs import read


def check_history(folder: Path, num_steps: int, batch_size: int, bound: int) -> None:
    """Every step was trained once, every prompt at most once, and no group was staler than `bound`."""
    seen = read(folder)
    assert [row["step"] for row in seen] == list(range(num_steps))
    trained = [i for row in seen for i in row["prompt_ids"]]
    assert len(trained) == len(set(trained)) == num_steps * batch_size
    assert all(0 <= row["staleness/max"] <= bound for row in seen)


def check_nothing_lost(folder: Path, step: int, max_drops: int = 12) -> None:
    """Every prompt before the cursor was trained, waits in the checkpoint, or was dropped for equal rewards.

    `max_drops`: how many may have been dropped since the last row.
    """
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    state = json.loads((checkpoint / "run_state.json").read_text())
    groups = checkpoint / "groups.json"
    waiting = [row["prompt"] for row in json.loads(groups.read_text())] if groups.exists() else []
    accounted = [i for row in read(folder) for i in row["prompt_ids"]] + state["pending"] + waiting
    assert len(accounted) == len(set(accounted))
    dropped = sum(row["rollout/groups_dropped"] for row in read(folder))
    assert 0 <= state["cursor"] - len(accounted) - dropped <= max_drops, "more is missing than was dropped"
