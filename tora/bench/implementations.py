"""What transformers' code costs against Tora's decoder, on one model, measured in turn in one process.

python -m tora.bench.implementations --shapes small --tokens 2048
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from learner.learner import Learner
from tora.bench.learner import Workload, make_batch, make_config, make_prompt, measure
from tora.bench.rows import LoraType, Samples, Setting
from tora.bench.shapes import shape_names, write_random_model

_NAMES = ("native", "transformers")
_MODES: tuple[LoraType, ...] = ("lora", "dora_cache")


def compare(shapes: str, lora_type: LoraType, workload: Workload, dtype: str) -> dict[str, Samples]:
    """Samples of a gradient step through each implementation, taken in turn; the first round is not kept."""
    with tempfile.TemporaryDirectory(prefix="tora-implementations-") as scratch:
        folder = write_random_model(shapes, Path(scratch), dtype=dtype)
        cfg = make_config(
            folder, Setting(lora_type), dtype="bf16" if dtype == "bfloat16" else "fp32", rank=8, tokens=workload.tokens
        )
        learners = {n: Learner(replace(cfg, model=replace(cfg.model, implementation=n))) for n in _NAMES}
        vocab_size = learners["native"].model.embedding.shape[0]
        prompt = make_prompt(workload, folder, vocab_size)
        batch = make_batch(workload, prompt, vocab_size)
        samples = {name: Samples() for name in _NAMES}
        for number in range(workload.rounds + 1):
            for name, learner in learners.items():
                measure(learner, prompt, batch, workload, samples[name] if number else Samples(), generate=False)
        return samples


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tora.bench.implementations", description=__doc__)
    parser.add_argument("--shapes", choices=shape_names(), default="small")
    parser.add_argument("--tokens", type=int, default=Workload().tokens)
    parser.add_argument("--rounds", type=int, default=Workload().rounds)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    workload = Workload(tokens=args.tokens, rounds=args.rounds)
    print(f"{args.shapes}, {args.dtype}, {args.tokens} tokens, {torch.get_num_threads()} threads")
    for lora_type in _MODES:
        samples = compare(args.shapes, lora_type, workload, args.dtype)
        ours, theirs = (samples[name] for name in _NAMES)
        ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
        peaks = [max(x.peak_bytes) / 2**20 for x in (ours, theirs)]
        print(
            f"{lora_type}: native {statistics.median(ours.seconds):.2f} s, transformers "
            f"{statistics.median(theirs.seconds):.2f} s, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}); peak {peaks[0]:.0f} and {peaks[1]:.0f} MiB"
        )


if __name__ == "__main__":
    main()
