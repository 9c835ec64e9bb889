"""The steps of `gpu_check`, in order: what each runs, for how long at most, and what its figures should be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tora.bench import gpu_figures as figures
from tora.bench.gpu_figures import LEARNER_TOKENS, Expected, Read

TORA = (sys.executable, "-m", "tora")
_SLOW_DECODE = "CUDA graphs are not replayed, or the adapter's kernels are not vLLM's"
_MISMATCH = "engine and learner are different policies: run the parity step, then look at the canary"
_STALL = "a sync waits for decode steps: its copies are not on a stream of their own"


@dataclass(frozen=True, slots=True)
class Step:
    """One program. It succeeds with exit code 0."""

    name: str
    command: tuple[str, ...]
    minutes: int
    """It is stopped after so many, as failed."""
    why: str
    read: Read = figures.nothing
    expected: Mapping[str, Expected] = field(default_factory=dict)
    """By figure. A figure without an entry is reported alone; one that is missing is an alarm."""
    gpus: int = 1
    """Left out on a machine with fewer."""
    needs: str = ""
    """What the command line must give for the step not to be left out."""


def steps(folder: Path, *, model: str, big_model: str | None) -> list[Step]:
    """`folder`: where each step has a folder of its name. `model`: a Hugging Face folder for the parity step.
    `big_model`: one of Qwen3-8B, for a real step; None leaves that out."""

    def tora_run(name: str, config: str, *overrides: str) -> tuple[str, ...]:
        return (*TORA, "run", config, *overrides, f"output_dir={folder / name / 'run'}")

    def bench(name: str, *words: str) -> tuple[str, ...]:
        return (*TORA, "bench", *words, "--json", str(folder / name / "rows.json"))

    sync_run = ("async_rl=false", "num_steps=10")
    real = (f"model.path={big_model}", "num_steps=3", "sync.canary_every=1")
    equal = {"mismatch_kl": Expected(0, 1e-6, alarm_above=1e-4, meaning=_MISMATCH)}
    close = {"mismatch_kl": Expected(1e-5, 1e-3, alarm_above=5e-3, meaning=_MISMATCH)}
    return [
        Step(
            "driver",
            ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"),
            1,
            "the driver is new enough for the installed CUDA, and the GPU for flash attention",
            figures.driver,
            {
                "driver": Expected(580, 999, alarm_below=580, meaning="PyTorch's CUDA 13 needs driver 580"),
                "compute capability": Expected(8.0, 99, alarm_below=8.0, meaning="bf16 kernels need an Ampere GPU"),
            },
        ),
        Step("doctor", (*TORA, "doctor"), 10, "the installation has no fault"),
        Step(
            "tests",
            (sys.executable, "-m", "pytest", "-m", "gpu", str(Path("tests", "gpu"))),
            40,
            "each finding's own proof",
        ),
        Step(
            "parity",
            (*TORA, "doctor", "--parity", model, "--json"),
            30,
            "vLLM computes what the learner does: LoRA, DoRA, QLoRA, QDoRA in float32 and bf16",
            figures.parity,
            {
                "bf16 mean gap, nat": Expected(0.001, 0.04, alarm_above=0.1, meaning="beyond what bf16 rounds"),
                "rows that hold": Expected(1, 1, alarm_below=1, meaning="a method is not served as it is trained"),
            },
        ),
        Step(
            "quickstart_torch",
            tora_run("quickstart_torch", "quickstart", *sync_run, "rollout.engine=torch"),
            15,
            "ten steps with the torch engine",
            figures.run,
            equal,
        ),
        Step(
            "quickstart_vllm",
            tora_run("quickstart_vllm", "quickstart", *sync_run, "rollout.engine=vllm"),
            20,
            "ten steps with vLLM in the same process, float32",
            figures.run,
            equal,
        ),
        Step(
            "quickstart_async",
            tora_run("quickstart_async", "quickstart", "num_steps=10"),
            20,
            "ten steps with vLLM and learner in Ray actors that share the GPU",
            figures.run,
            equal,
        ),
        Step(
            "learner",
            bench(
                "learner",
                *("learner", "--config", "qwen3/8B", "--tokens", str(LEARNER_TOKENS)),
                *("--only", "lora,dora_cache,qlora", "--compile", "both"),
            ),
            60,
            "training steps of Qwen3-8B on random weights",
            figures.learner,
            {
                "lora, tok/s": Expected(9e3, 13e3, kind="learner", alarm_below=1e3, meaning="attention is not packed"),
                "lora compiled, tok/s": Expected(12e3, 14e3, kind="learner", alarm_below=1e3),
                "dora_cache / lora": Expected(1.1, 1.5, alarm_above=2, meaning="the row norm is computed each step"),
                "qlora / lora": Expected(1.15, 1.3, alarm_above=3, meaning="NF4 is unpacked by a slow kernel"),
            },
        ),
        Step(
            "sync",
            bench(
                "sync",
                *("sync", "--config", "qwen3/8B", "--rank", "8", "--rows", "128", "--new-tokens", "256"),
                *("--rounds", "40", "--only", "between_rollouts"),
            ),
            40,
            "weight syncs into vLLM while it decodes 128 rows of Qwen3-8B, and what an adapter costs it",
            figures.sync,
            {
                **{f"{kind} install, ms": Expected(150, 400, alarm_above=1500, meaning=_STALL) for kind in _KINDS},
                **{f"{kind} stall, ms": Expected(0, 20, alarm_above=100, meaning=_STALL) for kind in _KINDS},
                "lora x128, tok/s": Expected(9e3, 12e3, kind="decode", alarm_below=1e3, meaning=_SLOW_DECODE),
                "lora x128 / base": Expected(0.75, 0.9, alarm_below=0.6, meaning=_SLOW_DECODE),
                "dora x128 / base": Expected(0.7, 0.85, alarm_below=0.6, meaning=_SLOW_DECODE),
            },
        ),
        Step(
            "real_graphs",
            tora_run("real_graphs", "qwen3/8B_lora_grpo_single_device", *real),
            60,
            "three real steps of Qwen3-8B with CUDA graphs",
            figures.run,
            {
                **close,
                "s/step": Expected(10, 14, kind="any", alarm_above=120, meaning="see time/ in its metrics.jsonl"),
            },
            needs="--big-model",
        ),
        Step(
            "real_eager",
            tora_run("real_eager", "qwen3/8B_lora_grpo_single_device", *real, "rollout.enforce_eager=true"),
            60,
            "the same without graphs: the canary's gap must not differ",
            lambda own: {**figures.run(own), **figures.graphs_against_eager(folder / "real_graphs", own)},
            {
                **close,
                "canary gap, graphs / eager": Expected(
                    0.5, 2, alarm_above=4, meaning="a CUDA graph replays an old adapter"
                ),
            },
            needs="--big-model",
        ),
        Step(
            "two_gpus_torchrun",
            (
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"),
                *tora_run("two_gpus_torchrun", "quickstart", *sync_run, "rollout.engine=vllm")[2:],
            ),
            20,
            "two ranks under torchrun, each with its own GPU and vLLM",
            figures.run,
            equal,
            gpus=2,
        ),
        Step(
            "two_gpus_ray",
            tora_run("two_gpus_ray", "quickstart", "num_steps=10", "rollout.num_workers=1"),
            20,
            "learner and worker on a GPU each, by Ray",
            figures.run,
            equal,
            gpus=2,
        ),
    ]


_KINDS = ("lora", "dora")
