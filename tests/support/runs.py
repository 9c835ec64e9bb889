"""Short runs of the quick-start, and their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHORT = ["num_steps=3", "batch_size=4", "grpo_samples=4", "eval.num_prompts=16", "eval.every=2", "checkpoint.every=2"]


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "version" in row]
