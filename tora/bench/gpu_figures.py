"""What the steps of `gpu_check` measure, and what is expected of each card.

Ranges are for an H100 SXM. An A100 decodes at 0.6 of it, and learns at 0.35 to 0.4. Those of the quick-start with the
torch engine and of learners that are not compiled hold what an H200 measured; the others are estimates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LEARNER_TOKENS = 8192
"""Packed tokens of a step of `bench learner`."""
Kind = Literal["decode", "learner", "any"]
"""What a range depends on besides the card: its memory's speed, its arithmetic, or neither."""
Status = Literal["ok", "outside", "alarm", "missing"]
_FACTORS: Mapping[str, Mapping[Kind, tuple[float, float]]] = {
    "H100": {"decode": (1.0, 1.0), "learner": (1.0, 1.0)},
    "H200": {"decode": (1.0, 1.4), "learner": (1.0, 1.05)},
    "A100": {"decode": (0.6, 0.6), "learner": (0.35, 0.4)},
}


@dataclass(frozen=True, slots=True)
class Expected:
    """A figure's range, and the values from which on something is wrong."""

    low: float
    high: float
    alarm_below: float = -math.inf
    alarm_above: float = math.inf
    kind: Kind = "any"
    """Of `low` and `high`. Alarms hold on every card."""
    meaning: str = ""
    """What an alarm means."""

    def on(self, card: str) -> tuple[float, float] | None:
        """The range on a card, by nvidia-smi's name of it; None if none is known."""
        if self.kind == "any":
            return self.low, self.high
        factors = next((of[self.kind] for name, of in _FACTORS.items() if name in card), None)
        return None if factors is None else (self.low * factors[0], self.high * factors[1])

    def judge(self, value: float, card: str) -> Status:
        """`outside` of the range is worth a look; not a number is an alarm."""
        if not (math.isfinite(value) and self.alarm_below <= value <= self.alarm_above):
            return "alarm"
        between = self.on(card)
        return "ok" if between is None or between[0] <= value <= between[1] else "outside"


Read = Callable[[Path], Mapping[str, float]]
"""Figures by name, from a step's folder. May raise OSError, ValueError, KeyError or IndexError if one is not there."""


def driver(folder: Path) -> dict[str, float]:
    """From nvidia-smi's `name, driver_version, memory.total, compute_cap`; of the least GPU."""
    rows = [line.split(", ") for line in _log(folder).splitlines() if line.count(", ") == 3]
    return {
        "GPUs": float(len(rows)),
        "driver": min(float(row[1].split(".")[0]) for row in rows),
        "compute capability": min(float(row[3]) for row in rows),
        "GPU memory, GiB": min(float(row[2].split()[0]) / 1024 for row in rows),
    }


def card(folder: Path) -> str:
    """The first GPU's name; empty if nvidia-smi has not run."""
    try:
        return next(line.split(", ")[0] for line in _log(folder).splitlines() if line.count(", ") == 3)
    except (OSError, StopIteration):
        return ""


def parity(folder: Path) -> dict[str, float]:
    """Of bf16: the largest mean gap in log-probs with an adapter; and the share of all rows that hold."""
    rows = json.loads(_json_in(_log(folder)))
    bf16 = [row["on_mean"] for row in rows if row["dtype"] == "bf16"]
    return {"bf16 mean gap, nat": max(bf16), "rows that hold": sum(row["holds"] for row in rows) / len(rows)}


def learner(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in _rows(folder):
        if row["seconds_per_step"] is None:
            continue
        name = ("q" if row["quantize_base"] else "") + row["lora_type"] + (" compiled" if row["compile"] else "")
        found[f"{name}, tok/s"] = LEARNER_TOKENS / row["seconds_per_step"]
        if row["lora_type"] != "lora" and row["ratio_to_lora"] is not None:
            found[f"{name} / lora"] = row["ratio_to_lora"]
        if row["quantize_base"] and row["ratio_to_unquantized"] is not None:
            found[f"{name} / {name[1:]}"] = row["ratio_to_unquantized"]
    return found


def sync(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in _rows(folder):
        if "stall_ms" in row and row["update"] == "between_rollouts":
            found[f"{row['lora_type']} install, ms"] = row["install_ms"]
            found[f"{row['lora_type']} stall, ms"] = row["stall_ms"][0]
        elif "ratio" in row:
            found[f"{row['lora_type']} x{row['batch']}, tok/s"] = row["tokens_per_s"]
            found[f"{row['lora_type']} x{row['batch']} / base"] = row["ratio"]
    return found


def run(folder: Path) -> dict[str, float]:
    """Of a run's metrics: the worst mismatch and canary, and the median step after the first."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for name in ("mismatch_kl", "canary/gap_max"):
        # null stands for a number that is not finite
        if values := [math.inf if row[name] is None else row[name] for row in rows if name in row]:
            found[name] = max(values)
    seconds = sorted([row["time/step_s"] for row in rows if "time/step_s" in row][1:])
    if seconds:
        found["s/step"] = seconds[len(seconds) // 2]
    return found


def graphs_against_eager(graphs: Path, eager: Path) -> dict[str, float]:
    """The canary's gap with CUDA graphs, relative to without."""
    a, b = (run(folder)["canary/gap_max"] for folder in (graphs, eager))
    return {"canary gap, graphs / eager": a / b if b else math.inf}


def nothing(folder: Path) -> dict[str, float]:
    return {}


def _log(folder: Path) -> str:
    return (folder / "output.log").read_text()


def _rows(folder: Path) -> Sequence[Mapping[str, Any]]:
    return json.loads((folder / "rows.json").read_text())


def _json_in(text: str) -> str:
    """The JSON array in a program's output, without the lines before and after it. Raises ValueError without one."""
    start = text.index("[\n  {")
    return text[start : start + json.JSONDecoder().raw_decode(text[start:])[1]]
