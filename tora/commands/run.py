"""`tora run`: train from a config, in this process, in several ranks of this machine or on Ray."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tora.commands.recipes import RECIPES, program
from tora.errors import ConfigError, nearest
from tora.launch.signals import STOPPED, Stop

if TYPE_CHECKING:
    from tora.config.schema import RunConfig


def add_parser(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="train",
        epilog=(
            "examples:\n  %(prog)s quickstart async_rl=false\n  %(prog)s mine.yaml optimizer.lr=1e-5 num_steps=200\n"
            "  %(prog)s lora_grpo_single_device --config qwen3/0.6B_lora_grpo_single_device"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.usage = (
        f"{run.prog} CONFIG [key=value ...]\n"
        f"       {run.prog} [--nproc_per_node N] RECIPE --config CONFIG [key=value ...]"
    )
    run.add_argument(
        "target", nargs="?", metavar="CONFIG|RECIPE", help=f"a config, or one of the recipes {', '.join(RECIPES)}"
    )
    run.add_argument("--config", help="name, as listed by `ls`, or path of a YAML file")
    run.add_argument(
        "--nproc_per_node",
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="number of learner processes; the same as learner_ranks=N",
    )
    run.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override keys of the config, e.g. model.lora_type=dora"
    )
    run.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    from tora.config.load import load_config, missing_folders

    if args.target is None:
        raise ConfigError(f"{program()} run needs a config, such as quickstart; `{program()} ls` lists them.")
    recipe = args.target if args.config is not None else None
    if recipe is None and args.target in RECIPES:
        raise ConfigError(f"The recipe {args.target} needs --config CONFIG; `{program()} ls` lists them.")
    config = args.config or args.target
    ranks = [] if args.nproc_per_node is None else [f"learner_ranks={args.nproc_per_node}"]
    cfg = load_config(config, [*args.overrides, *ranks])
    if recipe is not None:
        _check_recipe(recipe, cfg)
    for clause in missing_folders(cfg):
        raise ConfigError(f"{clause}; `{program()} download` fetches models.")
    if cfg.learner_ranks > 1 and not cfg.async_rl:
        if "RANK" not in os.environ:
            return _in_ranks(config, [*args.overrides, *ranks], cfg, args.stop)
        _check_ranks(cfg.learner_ranks)
    from tora.launch.launcher import run

    return 0 if run(cfg, args.stop) else STOPPED


def _check_recipe(recipe: str, cfg: RunConfig) -> None:
    """Raises ConfigError if the config trains something else, or on more devices, than the recipe's name says."""
    if recipe not in RECIPES:
        raise ConfigError(f"There is no recipe {recipe}{nearest(recipe, RECIPES)}.")
    lora_type = cfg.model.lora_type
    if recipe.startswith("full") and lora_type != "full":
        raise ConfigError(f"The recipe {recipe} needs model.lora_type=full, but the config has {lora_type}.")
    if recipe.startswith("lora") and lora_type == "full":
        raise ConfigError(f"The recipe {recipe} needs a model.lora_type other than full.")
    if recipe.endswith("single_device") and cfg.learner_ranks > 1:
        raise ConfigError(f"The recipe {recipe} runs on one device, but learner_ranks={cfg.learner_ranks}.")


def _check_ranks(learner_ranks: int) -> None:
    """Raises ConfigError if this process was started, as by torchrun, as one of another number of ranks."""
    world = os.environ.get("WORLD_SIZE")
    if world != str(learner_ranks):
        raise ConfigError(f"learner_ranks={learner_ranks} must equal the {world} ranks that were started.")


def _in_ranks(config: str, overrides: Sequence[str], cfg: RunConfig, stop: Stop | None) -> int:
    """Runs the same command in `cfg.learner_ranks` ranks on this machine. The exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", str(cfg.num_threads or 1))
    from tora.launch.local_ranks import run_ranks

    return run_ranks(["-m", "tora", "run", config, *overrides], cfg.learner_ranks, stop)
