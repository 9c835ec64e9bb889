"""`python -m tora.bench.accuracy`: the quick-start under every method, on one and two learner ranks, async and not.

Each run is the command that a user would type, in a process of its own. Prints a Markdown table of held-out accuracy
before and after, row by row as runs end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

METHODS = {
    "full": ("model.lora_type=full", "optimizer.lr=1e-4"),
    "lora": ("model.lora_type=lora",),
    "dora": ("model.lora_type=dora",),
    "dora_cache": ("model.lora_type=dora_cache",),
    "qlora": ("model.lora_type=lora", "model.quantize_base=true"),
    "qdora": ("model.lora_type=dora", "model.quantize_base=true"),
    "qdora_cache": ("model.lora_type=dora_cache", "model.quantize_base=true"),
}
"""Overrides. A full-weight run takes the rate that suits it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how a run goes."""

    ranks: int
    is_async: bool

    @property
    def name(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {'async' if self.is_async else 'sync'}"

    def command(self, config: str) -> list[str]:
        if self.is_async:
            return ["run", config, "async_rl=true", f"learner_ranks={self.ranks}"]
        torchrun = ["--nproc_per_node", str(self.ranks)] if self.ranks > 1 else []
        return ["run", *torchrun, config, "async_rl=false", "rollout.engine=torch"]


_TORA = "import sys; from tora.cli import main; sys.exit(main())"

PLACES = [Place(ranks, is_async) for is_async in (False, True) for ranks in (1, 2)]


def accuracies(config: str, place: Place, overrides: list[str]) -> tuple[float, float, float]:
    """Held-out accuracy before the first step and after the last, and seconds in all. Errors: RuntimeError with the
    end of what a failed run said."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tora-accuracy-") as scratch:
        output = Path(scratch) / "run"
        command = [sys.executable, "-c", _TORA, *place.command(config), *overrides, f"output_dir={output}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[3:])} ended with {done.returncode}: {done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return found[0], found[-1], time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--only", default=",".join(METHODS), metavar="METHOD,...")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run, e.g. num_steps=40")
    args = parser.parse_args()
    print(
        f"| held-out accuracy | {' | '.join(place.name for place in PLACES)} |\n|---{'|---' * len(PLACES)}|", flush=True
    )
    rows, failed = [], False
    for method in args.only.split(","):
        cells = []
        for place in PLACES:
            try:
                before, after, seconds = accuracies(args.config, place, [*METHODS[method], *args.overrides])
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                cells.append("failed")
                failed = True
                continue
            rows.append({"method": method, "place": place.name, "before": before, "after": after, "seconds": seconds})
            cells.append(f"{before:.3f} -> {after:.3f}")
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
