"""`python -m tora.bench.accuracy`: the quick start with every method, on one and two learner ranks, sync and async.

Each run is the command a user would type, in a separate process. Prints a Markdown table of held-out accuracy before
and after training, row by row as runs finish.
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

from tora.reporting.strict_json import to_json

METHODS = {
    "full": ("model.lora_type=full", "optimizer.lr=1e-4"),
    "lora": ("model.lora_type=lora",),
    "dora": ("model.lora_type=dora",),
    "dora_cache": ("model.lora_type=dora_cache",),
    "qlora": ("model.lora_type=lora", "model.quantize_base=true"),
    "qdora": ("model.lora_type=dora", "model.quantize_base=true"),
    "qdora_cache": ("model.lora_type=dora_cache", "model.quantize_base=true"),
}
"""Config overrides of each method. A full-weight run needs its own learning rate."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """How a run is launched."""

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

DEPLOYMENTS = [Deployment(ranks, is_async) for is_async in (False, True) for ranks in (1, 2)]


def accuracies(config: str, deployment: Deployment, overrides: list[str]) -> tuple[float, float, float]:
    """Held-out accuracy before the first step and after the last, and the run's seconds.

    Raises RuntimeError if the run fails, with the end of its stderr.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tora-accuracy-") as scratch:
        output = Path(scratch) / "run"
        command = [sys.executable, "-c", _TORA, *deployment.command(config), *overrides, f"output_dir={output}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[3:])} exited with {done.returncode}: {done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return found[0], found[-1], time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--only", default=",".join(METHODS), metavar="METHOD,...")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run, e.g. num_steps=40")
    args = parser.parse_args()
    names = " | ".join(deployment.name for deployment in DEPLOYMENTS)
    print(f"| held-out accuracy | {names} |\n|---{'|---' * len(DEPLOYMENTS)}|", flush=True)
    rows, failed = [], False
    for method in args.only.split(","):
        cells = []
        for deployment in DEPLOYMENTS:
            try:
                before, after, seconds = accuracies(args.config, deployment, [*METHODS[method], *args.overrides])
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                cells.append("failed")
                failed = True
                continue
            rows.append(
                {"method": method, "place": deployment.name, "before": before, "after": after, "seconds": seconds}
            )
            cells.append(f"{before:.3f} -> {after:.3f}")
            if args.json:
                Path(args.json).write_text(to_json(rows, indent=2) + "\n")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
