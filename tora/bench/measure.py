"""The part of `tora bench` that imports torch."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tora.bench.rows import print_rows, write_json
from tora.bench.shapes import write_random_model
from tora.errors import ConfigError

_CPU_SHAPES, _GPU_SHAPES = "tiny", "qwen2_5/1.5B"


def shapes_of(config: str | None) -> str:
    """The shapes for a config's name: `qwen2_5/7B_lora_grpo` -> `qwen2_5/7B`. For None, small shapes that suit this
    machine."""
    if config is None:
        return _GPU_SHAPES if torch.cuda.is_available() else _CPU_SHAPES
    family, slash, size = config.removesuffix(".yaml").rpartition("/")
    return f"{family}{slash}{size.partition('_')[0]}" if slash else config


def run(args: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available()
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = shapes_of(args.config)
    with tempfile.TemporaryDirectory(prefix="tora-bench-") as scratch:
        folder = write_random_model(shapes, Path(scratch), dtype="float32" if args.dtype == "fp32" else "bfloat16")
        rows = _sync(args, folder) if args.what == "sync" else _table(args, folder, shapes, gpu)
    if args.json is not None:
        write_json(rows, Path(args.json))
    return 0


def _table(args: argparse.Namespace, folder: Path, shapes: str, gpu: bool) -> list[object]:
    from tora.bench.learner import Workload, all_settings, run

    small = {"tokens": 512, "sequence": 128, "rows": 8, "new_tokens": 8, "rounds": 3} if not gpu else {}
    names = ("tokens", "sequence", "image", "rows", "new_tokens", "rounds")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    compiled = {"both": (False, True), "yes": (True,), "no": (False,)}[args.compile or ("both" if gpu else "no")]
    settings = all_settings(compiled)
    only = _only(args, [s.name for s in settings])
    settings = [s for s in settings if s.name in only]
    rows = run(
        folder,
        settings,
        Workload(**{**small, **given}),
        dtype=args.dtype,
        rank=args.rank,
        generate=args.what != "learner",
        interleave=not gpu or args.together,
    )
    print_rows(f"{shapes}, {args.dtype}, rank {args.rank}, {_device(gpu)}", rows)
    return list(rows)


def _sync(args: argparse.Namespace, folder: Path) -> list[object]:
    from tora.bench.sync import UPDATES, describe, run

    updates = _only(args, list(UPDATES))
    batches = [args.rows] if args.rows else [16, 64]
    new_tokens, rounds = args.new_tokens or 32, args.rounds or 100
    rows = []
    options = {"dtype": args.dtype, "rank": args.rank, "rows": batches, "new_tokens": new_tokens, "rounds": rounds}
    for row in run(folder, updates, **options):
        print(describe(row), flush=True)
        rows.append(row)
    return rows


def _only(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """`names`, or those of them that `--only` asks for. Raises ConfigError if it asks for another."""
    asked = names if args.only is None else args.only.split(",")
    if unknown := set(asked) - set(names):
        raise ConfigError(f"--only {min(unknown)}: bench {args.what} has {', '.join(dict.fromkeys(names))}.")
    return [name for name in names if name in asked]


def _device(gpu: bool) -> str:
    return torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
