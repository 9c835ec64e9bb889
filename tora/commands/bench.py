"""`tora bench`: measure speed and memory on random weights."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure speed and memory on random weights", allow_abbrev=False)
    bench.add_argument(
        "what",
        choices=("learner", "rollout", "sync", "table", "async"),
        help="rollout and table also generate; sync needs vLLM; async simulates the asynchronous schedule",
    )
    bench.add_argument("--config", help="a config whose model's shapes to take, or tiny or small")
    bench.add_argument("--json", metavar="FILE", help="write the rows there")
    bench.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    bench.add_argument("--rank", type=int, default=8)
    bench.add_argument(
        "--compile",
        choices=("both", "yes", "no"),
        help="both on a GPU; on a CPU no, since compiling takes most of a minute for each setting",
    )
    bench.add_argument("--only", metavar="NAME,...", help="of full, lora, dora, dora_cache, qlora, qdora, qdora_cache")
    bench.add_argument("--together", action="store_true", help="on a GPU: all models in memory, measured in turn")
    bench.add_argument("--threads", type=int, help="of the CPU")
    for name, of in {
        "tokens": "packed tokens a step",
        "sequence": "tokens of a prompt and its completion",
        "image": "side of a square image before each prompt, in pixels",
        "rows": "rollouts decoded at once",
        "new-tokens": "tokens decoded",
        "rounds": "rounds measured",
    }.items():
        bench.add_argument(f"--{name}", type=int, help=of)
    simulated = bench.add_argument_group("async", "the real loop, pool and buffer around sleeping workers and learner")
    simulated.add_argument("--actors", type=int, default=16, help="rollout workers")
    simulated.add_argument("--gen-latency", type=float, default=0.2, metavar="SECONDS", help="of a group, on average")
    simulated.add_argument("--learn-latency", type=float, default=0.2, metavar="SECONDS", help="of a step")
    simulated.add_argument("--jitter", type=float, default=0.0, help="of the seconds a group: deviation of their log")
    simulated.add_argument("--staleness", type=int, default=1, help="max_staleness")
    simulated.add_argument("--steps", type=int, default=20, help="steps timed")
    bench.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    if args.what == "async":
        from tora.bench.simulate import run
    else:
        from tora.bench.measure import run
    return run(args)
