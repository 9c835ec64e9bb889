"""Seconds per step and peak memory on a CPU, against TRL's GRPOTrainer on the same model and workload.

    python -m tora.bench.trl --trl /path/to/trl/bin/python --model FOLDER [--rounds 3] [--only trl-lora,torch-lora]

TRL stays in an environment of its own, whose Python is given. Each system runs in its own process, in turn, `rounds`
times. The figures are medians: of all steps but a process's first, and of the peaks of a run's largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

_STORY = "Tell a long story about {}."  # so long that no completion ends within a few dozen tokens
_THINGS = ("a bear", "a cat", "a deer", "an eel", "a fox", "a goat", "a hare", "an ibis")
_WORKER = Path(__file__).with_name("trl_worker.py")


@dataclass(frozen=True, slots=True)
class Workload:
    """What a step of each system does; TRL in float32 alone."""

    model: str
    prompts: int = 4
    group_size: int = 8
    new_tokens: int = 32
    steps: int = 4
    """The first warms up and is not counted."""
    rank: int = 8
    kl_coeff: float = 0.01
    dtype: str = "fp32"
    quantize: bool = False
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    texts: tuple[str, ...] = tuple(_STORY.format(thing) for thing in _THINGS)


@dataclass(frozen=True, slots=True)
class System:
    """`engine`: trl, torch or vllm. `method`: of `model.lora_type`."""

    engine: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.method}"


SYSTEMS = [
    *(System("trl", method) for method in ("lora", "full")),
    *(System(engine, method) for engine in ("torch", "vllm") for method in ("lora", "dora_cache", "full")),
]


@dataclass(slots=True)
class Samples:
    seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)
    """Of a run's largest process."""


def measure(system: System, workload: Workload, trl: str, folder: Path) -> Samples:
    """One run. Raises RuntimeError, with the end of its output, if it fails."""
    command = _trl(system, workload, trl, folder) if system.engine == "trl" else _tora(system, workload, folder)
    with (folder / "output.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = (folder / "output.log").read_text(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"{system.name} ended with {process.returncode}: {text[-1500:]}")
    if system.engine == "trl":
        seconds = json.loads(text[text.rindex("SECONDS ") + len("SECONDS ") :].splitlines()[0])
    else:
        rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        seconds = [row["time/step_s"] for row in rows if "time/step_s" in row]
    assert len(seconds) == workload.steps
    return Samples(seconds[1:], [usage.ru_maxrss / 2**20])


def _trl(system: System, workload: Workload, python: str, folder: Path) -> list[str]:
    settings = {**asdict(workload), "method": system.method, "folder": str(folder / "trl")}
    return [python, "-P", str(_WORKER), json.dumps(settings)]  # -P: `import trl` must not find this file


def _tora(system: System, workload: Workload, folder: Path) -> list[str]:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in workload.texts))
    config = {
        "extends": ["base/grpo.yaml", *(["base/lora.yaml"] if system.method != "full" else [])],
        "name": "trl",
        "output_dir": str(folder / "run"),
        "async_rl": False,
        "dtype": workload.dtype,
        "num_threads": workload.threads,
        "num_steps": workload.steps,
        "batch_size": workload.prompts,
        "grpo_samples": workload.group_size,
        "max_prompt_tokens": 128,
        "max_generated_tokens": workload.new_tokens,
        "model": {
            "path": workload.model,
            "lora_type": system.method,
            "lora_rank": workload.rank,
            "quantize_base": workload.quantize,
        },
        "rollout": {"engine": system.engine, "kv_cache_gib": 0.25},
        "loss": {"kl_coeff": workload.kl_coeff},
        "dataset": {
            "_component_": "tora.tasks.dataset.file_dataset",
            "path": str(folder / "prompts.jsonl"),
            "answer_key": None,
        },
        "rewards": [{"_component_": "tora.bench.trl.letters"}],
        "checkpoint": {"every": 10**6},
        "eval": None,
    }
    if system.method == "full":
        del config["model"]["lora_rank"]
    (folder / "trl.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "tora", "run", str(folder / "trl.yaml")]


def letters(completions: Sequence[str], **columns: object) -> list[float]:
    """A reward that nearly always differs within a group, and costs nothing."""
    return [text.count("e") / 10 for text in completions]


def table(found: Mapping[System, Samples]) -> list[str]:
    """Markdown rows, with TRL's LoRA, or the first system if that was left out, as 1."""
    first = found.get(System("trl", "lora")) or next(iter(found.values()))
    time, peak = statistics.median(first.seconds), statistics.median(first.peak_gib)
    rows = ["| system | s/step | of the first | peak GiB | of the first |", "|---|---|---|---|---|"]
    for system, samples in found.items():
        seconds, gib = statistics.median(samples.seconds), statistics.median(samples.peak_gib)
        spread = f"{min(samples.seconds):.1f} to {max(samples.seconds):.1f}"
        rows.append(
            f"| {system.name} | {seconds:.2f} ({spread}) | {seconds / time:.2f} | {gib:.2f} | {gib / peak:.2f} |"
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", required=True, metavar="PYTHON", help="the Python of TRL's environment")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a Hugging Face model with a chat template")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of each run, of which the first is not counted")
    parser.add_argument("--only", metavar="NAME,...", help=f"only these: {', '.join(s.name for s in SYSTEMS)}")
    args = parser.parse_args(argv)
    names = [system.name for system in SYSTEMS] if args.only is None else args.only.split(",")
    if unknown := set(names) - {system.name for system in SYSTEMS}:
        parser.error(f"there is no system {min(unknown)}")
    workload = Workload(str(Path(args.model).absolute()), steps=args.steps)
    found = {system: Samples() for system in SYSTEMS if system.name in names}
    for _ in range(args.rounds):
        for system, samples in found.items():
            with tempfile.TemporaryDirectory(prefix="tora-trl-") as folder:
                once = measure(system, workload, args.trl, Path(folder))
            samples.seconds += once.seconds
            samples.peak_gib += once.peak_gib
            print(
                f"{system.name}: {', '.join(f'{s:.1f}' for s in once.seconds)} s, {once.peak_gib[0]:.2f} GiB",
                flush=True,
            )
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
