"""What an evaluation costs the learner: `python -m tora.bench.waiting [--room] [KEY=VALUE ...]`.

Runs the asynchronous quick-start without evaluations, and with one every ten steps: behind training, behind it apart on
a worker of its own (`eval.num_workers=1`), and blocking it. The four come in turn, `--rounds` times over. Of each run
it reports the share of its wall time in which the learner waits, from the end of the first step to the end of the
last, and seconds a step. With `--room` the real loop, pool and buffer run around workers and a learner that only sleep,
as engines do that have room for an evaluation beside their groups; else it also costs the generation of its rollouts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from subprocess import run
from typing import Any

from tora.bench.simulate import Scenario, SleepingWorker, prompt, scenario_config, timed_run
from tora.config.schema import EvalConfig
from tora.reporting.metrics import read_rows

_EVALUATIONS = {
    "off": ["eval=null"],
    "behind": ["eval.every=10", "eval.at_start=false", "eval.num_workers=0"],
    "apart": ["eval.every=10", "eval.at_start=false", "eval.num_workers=1"],
    "blocking": ["eval.every=10", "eval.at_start=false", "eval.blocking=true"],
}


@dataclass(frozen=True, slots=True)
class Waited:
    share: float
    """Of the wall time between the ends of the first and the last step in which the learner did not work."""
    step_seconds: float


def waited(rows: list[dict[str, Any]], ends: list[float]) -> Waited:
    """`rows`: of the steps. `ends`: when each was logged."""
    seconds = ends[-1] - ends[0]
    worked = sum(row["time/learner_s"] for row in rows[1:])
    return Waited(1 - worked / seconds, seconds / (len(rows) - 1))


class Dated:
    """A metric logger that writes when each step was logged, by `time.perf_counter`, into `file`."""

    def __init__(self, file: str) -> None:
        self._file, self._ends = Path(file), list[float]()

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        if "version" in payload:
            self._ends.append(time.perf_counter())

    def close(self) -> None:
        self._file.write_text(json.dumps(self._ends))


def measure(evaluation: str, overrides: list[str]) -> Waited:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="tora-bench-") as scratch:
        ends, folder = Path(scratch) / "ends.json", Path(scratch) / "run"
        logger = f"metric_logger=[{{_component_: tora.bench.waiting.Dated, file: {ends}}}]"
        words = ["async_rl=true", *_EVALUATIONS[evaluation], *overrides, logger, f"output_dir={folder}"]
        ended = run([sys.executable, "-m", "tora", "run", "quickstart", *words], capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(ended.stderr)
        steps = [row for row in read_rows(folder / "metrics.jsonl") if "version" in row]
        return waited(steps, json.loads(ends.read_text()))


def measure_room(evaluation: str) -> Waited:
    """A run whose workers need no longer for a group while they evaluate."""
    scenario = Scenario(num_actors=16, gen_latency=0.2, learn_latency=0.1, jitter=0.0, num_steps=60)
    cfg, prompts = scenario_config(scenario, 1), [prompt(number) for number in range(512)]
    if evaluation != "off":
        how = {"blocking": evaluation == "blocking", "num_workers": int(evaluation == "apart")}
        cfg = replace(cfg, eval=EvalConfig(dataset={}, every=10, at_start=False, samples=1, **how))
    numbers = count()
    learner = timed_run(
        cfg, lambda: SleepingWorker(scenario, next(numbers)), prompt, scenario.learn_latency, eval_prompts=prompts
    )
    step_seconds = learner.seconds / scenario.num_steps
    return Waited(1 - scenario.learn_latency / step_seconds, step_seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tora.bench.waiting", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--room", action="store_true", help="engines that only sleep, with room for an evaluation")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args(arguments)
    if args.room and args.overrides:
        parser.error(f"--room runs no config, which {args.overrides[0]} would change")
    found: dict[str, list[Waited]] = {name: [] for name in _EVALUATIONS}
    for _ in range(args.rounds):
        for name in _EVALUATIONS:
            began = time.perf_counter()
            found[name].append(measure_room(name) if args.room else measure(name, args.overrides))
            last = found[name][-1]
            took = time.perf_counter() - began
            print(f"{name}: waits {last.share:.1%}, {last.step_seconds:.3f} s a step ({took:.0f} s)", flush=True)
    share = {name: statistics.median(each.share for each in runs) for name, runs in found.items()}
    seconds = {name: statistics.median(each.step_seconds for each in runs) for name, runs in found.items()}
    for name in _EVALUATIONS:
        print(
            f"{name:9} the learner waits {share[name]:6.1%} of the time, {share[name] / share['off']:.2f}x as without; "
            f"{seconds[name]:.3f} s a step, {seconds[name] / seconds['off']:.2f}x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
