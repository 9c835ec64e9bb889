"""Runs in processes of their own, and checks of their metrics after something was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runs import SHORT


@contextmanager
def tora_run(folder: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """`tora run quickstart` in its own process group, as a terminal would start it."""
    words = [*SHORT, f"output_dir={folder}", *overrides]
    scratch = tempfile.mkdtemp(dir="/tmp")  # short, because Ray's socket paths start with it
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tora", "run", "quickstart", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TMPDIR": scratch},
        )
        try:
            yield child
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait(60)
            left = [file.name for file in Path(scratch).glob("tora-*")]
            shutil.rmtree(scratch, ignore_errors=True)
        assert not left


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(holds: Callable[[], Any], child: subprocess.Popen[bytes], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert child.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def check_history(folder: Path, num_steps: int, batch_size: int, bound: int) -> None:
    """Every step once, every prompt at most once, and no group staler than allowed."""
    seen = rows(folder)
    assert [row["step"] for row in seen] == list(range(num_steps))
    trained = [i for row in seen for i in row["prompt_ids"]]
    assert len(trained) == len(set(trained)) == num_steps * batch_size
    assert all(0 <= row["staleness/max"] <= bound for row in seen)


def check_nothing_lost(folder: Path, step: int, max_drops: int = 12) -> None:
    """Every prompt before the cursor was trained, is in the checkpoint, or was dropped because it had no signal."""
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    state = json.loads((checkpoint / "run_state.json").read_text())
    groups = checkpoint / "groups.json"
    waiting = [row["prompt"] for row in json.loads(groups.read_text())] if groups.exists() else []
    accounted = [i for row in rows(folder) for i in row["prompt_ids"]] + state["pending"] + waiting
    assert len(accounted) == len(set(accounted))
    dropped = sum(row["rollout/groups_dropped"] for row in rows(folder))
    assert 0 <= state["cursor"] - len(accounted) - dropped <= max_drops, "apart from groups dropped since the last row"
