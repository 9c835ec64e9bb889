"""The torch engine against vLLM in synchronous runs on a CPU: `python -m tora.bench.engines --model FOLDER`.

What `rollout.engine: auto` is decided by. Each run is a process of its own, the two engines in turn. The figures are
medians: of all steps but a run's first, of the memory of a run's largest process, and of all a run's other seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tora.bench.trl import Samples, System, Workload, measure

_ENGINES = ("torch", "vllm")


@dataclass(slots=True)
class Runs:
    samples: Samples = field(default_factory=Samples)
    started: list[float] = field(default_factory=list)
    """Seconds of a run outside its steps but the first."""


def workloads(model: str, steps: int) -> dict[str, Workload]:
    one = Workload(model, steps=steps)
    return {
        "32 rollouts of 32 tokens": one,
        "32 rollouts of 32 tokens, bf16": replace(one, dtype="bf16"),
        "32 rollouts of 32 tokens, NF4": replace(one, quantize=True),
        "32 rollouts of 128 tokens": replace(one, new_tokens=128),
        "128 rollouts of 32 tokens": replace(one, prompts=8, group_size=16),
    }


def compare(workload: Workload, rounds: int) -> dict[str, Runs]:
    found = {engine: Runs() for engine in _ENGINES}
    for _ in range(rounds):
        for engine, runs in found.items():
            began = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="tora-engines-") as folder:
                once = measure(System(engine, "lora"), workload, "", Path(folder))
            runs.started.append(time.perf_counter() - began - sum(once.seconds))
            runs.samples.seconds += once.seconds
            runs.samples.peak_gib += once.peak_gib
    return found


def row(name: str, found: dict[str, Runs]) -> str:
    """A row of Markdown: of torch and vLLM, seconds a step, their ratio, GiB and seconds to start."""
    step, peak, start = (
        [statistics.median(values(found[engine])) for engine in _ENGINES]
        for values in (lambda r: r.samples.seconds, lambda r: r.samples.peak_gib, lambda r: r.started)
    )
    seconds = " | ".join(f"{value:.2f}" for value in step)
    gib, starts = (
        " and ".join(f"{value:.{digits}f}" for value in values) for values, digits in ((peak, 1), (start, 0))
    )
    return f"| {name} | {seconds} | {step[0] / step[1]:.2f} | {gib} | {starts} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tora.bench.engines", description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a Hugging Face model with a chat template")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps of each run, of which the first is not counted")
    parser.add_argument("--only", metavar="TEXT", help="only the workloads whose name has this text")
    args = parser.parse_args(argv)
    print("| workload | torch, s/step | vLLM, s/step | torch / vLLM | GiB | s to start |\n|---|---|---|---|---|---|")
    for name, workload in workloads(str(Path(args.model).absolute()), args.steps).items():
        if args.only is None or args.only in name:
            print(row(name, compare(workload, args.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
