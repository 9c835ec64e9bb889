"""`tora bench`: measure speed and memory on random weights."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure speed and memory on random weights", allow_abbrev=False)
    bench.add_argument(
        "what",
        choices=("learner", "rollout", "sync", "table", "async", "episodes"),
        help="learner: training steps; rollout, table: training steps and generation; sync: weight syncs into vLLM; "
        "async: the asynchronous schedule, simulated; episodes: turns with tools, simulated",
    )
    bench.add_argument(
        "--config", help="use the model shapes that this config's name gives, such as qwen3/0.6B, or tiny or small"
    )
    bench.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    bench.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision of the base weights")
    bench.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    bench.add_argument(
        "--compile",
        choices=("both", "yes", "no"),
        help="with torch.compile, without, or both; default: both on a GPU, no on a CPU, where compiling takes up to a "
        "minute per setting",
    )
    bench.add_argument(
        "--only",
        metavar="NAME,...",
        help="only these: full, lora, dora, dora_cache, qlora, qdora, qdora_cache; for sync: between_rollouts, "
        "in_flight, in_flight_recompute_kv",
    )
    bench.add_argument(
        "--together", action="store_true", help="on a GPU: keep all models in memory and measure them in turn"
    )
    bench.add_argument("--threads", type=int, help="CPU threads")
    for name, of in {
        "tokens": "packed tokens per step",
        "sequence": "tokens of a prompt and its completion",
        "image": "put a square image of this many pixels a side before each prompt",
        "rows": "rollouts decoded at once",
        "new-tokens": "tokens decoded per rollout",
        "rounds": "rounds to measure",
    }.items():
        bench.add_argument(f"--{name}", type=int, help=of)
    simulated = bench.add_argument_group(
        "async", "the real loop, pool and buffer with workers and a learner that only sleep"
    )
    simulated.add_argument("--actors", type=int, default=16, help="rollout workers")
    simulated.add_argument("--gen-latency", type=float, default=0.2, metavar="SECONDS", help="mean time per group")
    simulated.add_argument("--learn-latency", type=float, default=0.2, metavar="SECONDS", help="time per step")
    simulated.add_argument(
        "--jitter", type=float, default=0.0, help="standard deviation of the logarithm of the time per group"
    )
    simulated.add_argument(
        "--oversample", type=float, metavar="SHARE", help="rollout.stragglers=oversample with this share"
    )
    simulated.add_argument("--parts", type=int, help="step_parts")
    simulated.add_argument("--staleness", type=int, default=1, help="max_staleness")
    simulated.add_argument("--steps", type=int, default=20, help="steps to time")
    episodes = bench.add_argument_group(
        "episodes", "the real loop, pool, player and environment processes with an engine and a learner that only sleep"
    )
    episodes.add_argument("--groups", type=int, default=8, help="groups of 8 episodes played at once")
    episodes.add_argument("--turns", type=int, default=5, help="turns of an episode")
    episodes.add_argument("--turn-latency", type=float, default=1.0, metavar="SECONDS", help="time to sample a turn")
    episodes.add_argument("--tool-latency", type=float, default=0.2, metavar="SECONDS", help="time of a tool's answer")
    episodes.add_argument(
        "--train-share", type=float, default=1.0, metavar="SHARE", help="time of a step against sampling"
    )
    bench.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    if args.what == "async":
        from tora.bench.simulate import run
    elif args.what == "episodes":
        from tora.bench.episodes import run
    else:
        from tora.bench.measure import run
    return run(args)
