"""Short runs of the shipped configs in this process, and their rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tora.config.load import load_config
from tora.launch.launcher import run

SHORT = [
    *("num_steps=3", "batch_size=4", "grpo_samples=4", "checkpoint.every=2"),
    *("eval.num_prompts=16", "eval.every=2", "eval.num_workers=0"),  # an engine less to start
]


def train(config: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` after a short run with a canary at the second step."""
    assert run(load_config(config, [*SHORT, "sync.canary_every=2", f"output_dir={folder}", *overrides]))
    return read(folder)


def own_imports(patch: pytest.MonkeyPatch) -> None:
    """A run adds folders to import from; they and the module `bad` of another test are out of the way."""
    patch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("bad", None)


def read(folder: Path) -> list[dict[str, Any]]:
    """The complete rows of `metrics.jsonl`, which a run may still be writing; none before it exists."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of training steps. Rows of evaluations have no version."""
    return [row for row in rows if "version" in row]
