"""`python -m tora.bench.memory_plan`: the learner's peak memory as `tora plan` computes it, and as measured.

Each setting runs in a process of its own: a learner takes two steps of two equal micro-batches, and the peak of the
second counts, minus what the process held before the learner was built. On a CPU glibc must return freed memory at
once, which it does with the variables in `ENVIRONMENT`; what it would keep otherwise is not part of the plan.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from learner.learner import Learner
from tora.bench.learner import Dtype, Workload, make_batch, make_config, make_prompt
from tora.bench.memory import peak_total
from tora.bench.rows import Setting
from tora.bench.shapes import write_random_model
from tora.config.schema import RunConfig
from tora.models.load import read_config
from tora.plan.activations import MicroBatch
from tora.plan.learner import learner_memory
from tora.plan.shapes import read_shapes
from tora.plan.training import training_of
from tora.types import MicroBatch as Packed
from tora.types import TrainBatch

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
SETTINGS = {
    "lora": Setting("lora"),
    "dora": Setting("dora"),
    "dora_cache": Setting("dora_cache"),
    "qlora": Setting("lora", quantize_base=True),
    "full": Setting("full"),
    "lora, checkpointed": Setting("lora"),
    "full, checkpointed": Setting("full"),
}
"""By name; those that end in `checkpointed` checkpoint every layer."""


def config_of(folder: Path, name: str, dtype: Dtype, workload: Workload) -> RunConfig:
    cfg = make_config(folder, SETTINGS[name], dtype=dtype, rank=8, tokens=workload.tokens)
    return replace(cfg, activation_checkpointing="full" if name.endswith("checkpointed") else "none")


def planned_bytes(cfg: RunConfig, packed: Packed, workload: Workload, *, on_gpu: bool) -> int:
    """What the plan says of a learner that trains on such micro-batches."""
    training = training_of(cfg, read_shapes(read_config(Path(cfg.model.path))))
    batch = MicroBatch(
        tokens=len(packed.tokens_T),
        responses=len(packed.response_N),
        patches=0,
        longest=workload.sequence,
        on_gpu=on_gpu,
        checkpointing=cfg.activation_checkpointing,
    )
    return learner_memory(training, batch).peak


def two_micro_batches(folder: Path, workload: Workload, vocab_size: int) -> TrainBatch:
    """Of `workload.tokens` tokens each."""
    batch = make_batch(workload, make_prompt(workload, folder, vocab_size), vocab_size)
    return replace(batch, micro_batches=batch.micro_batches * 2)


def measure(shapes: str, name: str, dtype: Dtype, workload: Workload) -> tuple[int, int]:
    """Planned and measured bytes, in this process."""
    with tempfile.TemporaryDirectory(prefix="tora-bench-") as scratch:
        # the first loads libraries and kernels
        _measured("tiny", Path(scratch) / "tiny", name, dtype, replace(workload, tokens=256, sequence=64))
        return _measured(shapes, Path(scratch) / "model", name, dtype, workload)


def _measured(shapes: str, folder: Path, name: str, dtype: Dtype, workload: Workload) -> tuple[int, int]:
    write_random_model(shapes, folder, dtype="float32" if dtype == "fp32" else "bfloat16")
    cfg = config_of(folder, name, dtype, workload)

    def prepare() -> tuple[Learner, TrainBatch]:
        learner = Learner(cfg)
        batch = two_micro_batches(folder, workload, learner.model.embedding.shape[0])
        learner.step(batch)  # makes the optimizer's state
        return learner, batch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gc.collect()
    measured, (_, batch) = peak_total(device, prepare, lambda made: made[0].step(made[1]))
    return planned_bytes(cfg, batch.micro_batches[0], workload, on_gpu=device.type == "cuda"), measured


def in_a_process(shapes: str, name: str, dtype: Dtype, workload: Workload) -> tuple[int, int]:
    """`measure`, in a process of its own."""
    size = [f"--tokens={workload.tokens}", f"--sequence={workload.sequence}"]
    words = ["-m", "tora.bench.memory_plan", f"--shapes={shapes}", f"--only={name}", f"--dtype={dtype}", *size, "--one"]
    done = subprocess.run(
        [sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    )
    planned, measured = json.loads(done.stdout.splitlines()[-1])
    return planned, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="small", help="a name of tora.models.released")
    parser.add_argument("--tokens", type=int, default=2048, help="packed tokens of a micro-batch")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a prompt and its completion")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="only this one")
    parser.add_argument("--only", choices=SETTINGS, help="only this setting")
    parser.add_argument("--one", action="store_true", help="measure in this process, and print the bytes as JSON")
    args = parser.parse_args()
    workload = Workload(tokens=args.tokens, sequence=args.sequence)
    if args.one:
        print(json.dumps(measure(args.shapes, args.only, args.dtype, workload)))
        return
    print(f"{'GiB':28} planned  measured  ratio")
    for dtype in [args.dtype] if args.dtype else ("fp32", "bf16"):
        for name in [args.only] if args.only else SETTINGS:
            planned, measured = in_a_process(args.shapes, name, dtype, workload)
            label = f"{dtype}, {name}"
            print(f"{label:28} {planned / 2**30:7.3f}  {measured / 2**30:8.3f}  {planned / measured:5.3f}", flush=True)


if __name__ == "__main__":
    main()
