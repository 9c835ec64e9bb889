"""`tora plan`: the memory that a run needs, before anything is loaded."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    plan = commands.add_parser("plan", help="show the memory that a run needs, without starting it", allow_abbrev=False)
    plan.add_argument("config", metavar="CONFIG", help="name, as listed by `ls`, or path of a YAML file")
    plan.add_argument(
        "--gpu-gib", type=float, metavar="GIB", help="plan for GPUs of this size, such as 24, instead of this machine"
    )
    plan.add_argument("--gpus", type=int, metavar="N", help="number of GPUs; default: as many as the run asks for")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the config")
    plan.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    """Prints the plan; returns 1 if the run does not fit."""
    from tora.config.load import load_config
    from tora.errors import ConfigError

    for name, value in (("--gpu-gib", args.gpu_gib), ("--gpus", args.gpus)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value} must be greater than 0.")
    cfg = load_config(args.config, args.overrides)

    from dataclasses import replace

    from tora.launch.engines import resolved_engine
    from tora.launch.eval_workers import with_eval_workers
    from tora.launch.memory import Devices, here, model_shapes, nominal, plan_run, remedy
    from tora.plan.report import print_plan

    if args.gpu_gib is None:
        devices = replace(here(cfg), gpus=args.gpus)
        cfg = resolved_engine(cfg, on_gpu=devices.on_gpu)
    else:
        devices = Devices(True, nominal(args.gpu_gib), args.gpus)
        cfg = resolved_engine(cfg, on_gpu=True, has_vllm=True)
    cfg = with_eval_workers(cfg, on_gpu=devices.on_gpu)
    shapes = model_shapes(cfg)
    plan = plan_run(cfg, shapes, devices)
    print_plan(args.config, plan)
    if plan.fits:
        return 0
    print(f"{plan.why_not()}. {remedy(cfg, shapes, devices)}")
    return 1
