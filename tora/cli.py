"""The command line: `tora` and `tune` are one program, which keeps torchtune's own recipes and commands.

Heavy imports happen inside the commands, so that help and every wrong input answer at once. Exit code 2: the input is
wrong; 1: the run failed; both with one sentence on stderr. 130: a signal ended the run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tora import torchtune_cli
from tora.config.load import config_file, config_names, load_config, missing_folders
from tora.config.schema import RunConfig
from tora.errors import ConfigError, ToraError, nearest

_RECIPES = (
    "full_grpo_single_device",
    "full_grpo_distributed",
    "lora_grpo_single_device",
    "lora_grpo_distributed",
)
_NO_RECIPE = "(tora run CONFIG)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if _is_torchtunes(argv):
            torchtune_cli.delegate(argv)
            return 0
        args = _parse(argv)
        return args.command(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ToraError as error:
        print(error, file=sys.stderr)
        return 1


def _program() -> str:
    return "tune" if Path(sys.argv[0]).stem == "tune" else "tora"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=_program(), description="GRPO that trains an adapter.", allow_abbrev=False)
    parser.set_defaults(command=lambda args: parser.print_help() or 0)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run = commands.add_parser("run", help="train", allow_abbrev=False)
    run.usage = (
        f"{run.prog} CONFIG [key=value ...]\n"
        f"       {run.prog} [--nproc_per_node N] RECIPE --config CONFIG [key=value ...]"
    )
    run.add_argument("target", metavar="CONFIG|RECIPE", help=f"a config, or one of {', '.join(_RECIPES)}")
    run.add_argument("--config", help="name in `ls` or path of a YAML file")
    run.add_argument("--nproc_per_node", "--nproc-per-node", type=int, metavar="N", help="learner_ranks=N")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="for instance model.lora_type=dora")
    run.set_defaults(command=_run)

    validate = commands.add_parser("validate", help="check configs without running them", allow_abbrev=False)
    validate.add_argument("configs", nargs="+", metavar="CONFIG|key=value")
    validate.set_defaults(command=_validate)

    ls = commands.add_parser("ls", help="list recipes and configs")
    ls.set_defaults(command=_ls)

    cp = commands.add_parser("cp", help="copy a config, to edit it")
    cp.add_argument("name", help="name in `ls`")
    cp.add_argument("destination", type=Path, help="folder or file")
    cp.add_argument("-n", "--no-clobber", action="store_true", help="leave a file that is there")
    cp.add_argument("--make-parents", action="store_true", help="make the folders that are missing")
    cp.set_defaults(command=_cp)

    _add_bench(commands.add_parser("bench", help="measure speed and memory on random weights", allow_abbrev=False))

    doctor = commands.add_parser("doctor", help="check this machine, and say what to do", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--parity", metavar="MODEL", help="instead compare vLLM with the learner on this model folder")
    doctor.set_defaults(command=_doctor)

    commands.add_parser("download", help="download a model (torchtune's command)")
    commands.add_parser("cat", help="print a torchtune config (torchtune's command)")

    args, rest = parser.parse_known_args(argv)
    if rest:
        # argparse gives up on the overrides that follow an option, as in `run RECIPE --config CONFIG key=value`
        if args.command is not _run or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    return args


def _add_bench(bench: argparse.ArgumentParser) -> None:
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
    bench.set_defaults(command=_bench)


def _bench(args: argparse.Namespace) -> int:
    if args.what == "async":
        from tora.bench.simulate import run
    else:
        from tora.bench.command import run
    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    if args.parity is not None:
        from tora.launch import parity

        return parity(args.parity, as_json=args.json)
    from tora.doctor import run

    return run(args.json)


def _is_torchtunes(argv: Sequence[str]) -> bool:
    """Whether torchtune's own program answers this command line. Raises `ConfigError` for a recipe that nobody has."""
    match argv:
        case ["download" | "cat", *_]:
            return True
        case ["validate", name]:
            return torchtune_cli.owns_config(Path(name))
        case ["run", *rest] if "--config" in rest and not set(rest) & {*_RECIPES, "-h", "--help"}:
            words = [word for word in rest[: rest.index("--config")] if word[0] != "-" and "=" not in word]
            known = torchtune_cli.recipes()
            if not words or words[-1] in known or "." in words[-1] or Path(f"{words[-1]}.py").exists():
                return True
            raise ConfigError(f"There is no recipe {words[-1]}{nearest(words[-1], [*_RECIPES, *known])}.")
        case ["cp", name, _, *_] if not name.startswith("-") and name not in config_names():
            known = torchtune_cli.recipes()
            theirs = {*known, *(config for configs in known.values() for config in configs)}
            if name in theirs:
                return True
            raise ConfigError(f"There is no config {name} to copy{nearest(name, [*config_names(), *theirs])}.")
    return False


def _run(args: argparse.Namespace) -> int:
    recipe = args.target if args.config is not None else None
    if recipe is None and args.target in _RECIPES:
        raise ConfigError(f"The recipe {args.target} needs --config CONFIG; `{_program()} ls` lists them.")
    config = args.config or args.target
    ranks = [] if args.nproc_per_node is None else [f"learner_ranks={args.nproc_per_node}"]
    cfg = load_config(config, [*args.overrides, *ranks])
    if recipe is not None:
        _check_recipe(recipe, cfg)
    for clause in missing_folders(cfg):
        raise ConfigError(f"{clause}; `{_program()} download` fetches models.")
    if cfg.learner_ranks > 1 and not cfg.async_rl:
        _check_ranks(cfg.learner_ranks) if "RANK" in os.environ else _torchrun(config, [*args.overrides, *ranks], cfg)
    from tora.launch import run

    return 0 if run(cfg) else 130


def _check_recipe(recipe: str, cfg: RunConfig) -> None:
    """A recipe's name promises what is trained and on how many devices."""
    if recipe not in _RECIPES:
        raise ConfigError(f"There is no recipe {recipe}{nearest(recipe, _RECIPES)}.")
    lora_type = cfg.model.lora_type
    if recipe.startswith("full") and lora_type != "full":
        raise ConfigError(f"The recipe {recipe} needs model.lora_type=full, and the config says {lora_type}.")
    if recipe.startswith("lora") and lora_type == "full":
        raise ConfigError(f"The recipe {recipe} needs a model.lora_type other than full.")
    if recipe.endswith("single_device") and cfg.learner_ranks > 1:
        raise ConfigError(f"The recipe {recipe} runs on one device, not on learner_ranks={cfg.learner_ranks}.")


def _check_ranks(learner_ranks: int) -> None:
    """Inside torchrun, which somebody started for this very run."""
    world = os.environ.get("WORLD_SIZE")
    if world != str(learner_ranks):
        raise ConfigError(f"learner_ranks={learner_ranks} must be the {world} ranks that torchrun started.")


def _torchrun(config: str, overrides: Sequence[str], cfg: RunConfig) -> NoReturn:
    """The same command in as many ranks on this machine, in this process's place."""
    os.environ.setdefault("OMP_NUM_THREADS", str(cfg.num_threads or 1))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = ["--standalone", f"--nproc_per_node={cfg.learner_ranks}"]
    words = ["-m", "torch.distributed.run", *ranks, "-m", "tora", "run", config, *overrides]
    os.execv(sys.executable, [sys.executable, *words])


def _validate(args: argparse.Namespace) -> int:
    names = [word for word in args.configs if "=" not in word]
    overrides = [word for word in args.configs if "=" in word]
    if not names:
        raise ConfigError("There is no config to validate, only overrides.")
    code = 0
    for name in names:
        try:
            notes = missing_folders(load_config(name, overrides))
            print(f"{name}: OK{''.join(f' ({note})' for note in notes)}")
        except ConfigError as error:  # the other files still get their line
            print(f"{name}: {error}", file=sys.stderr)
            code = 2
    return code


def _ls(args: argparse.Namespace) -> int:
    """Our recipes with their configs; as `tune`, torchtune's too. A config's name ends in its recipe's."""
    table: dict[str, list[str]] = {recipe: [] for recipe in (*_RECIPES, _NO_RECIPE)}
    for name in config_names():
        of = (recipe for recipe in _RECIPES if name.endswith(recipe.removesuffix("_distributed")))
        table[next(of, _NO_RECIPE)].append(name)
    if _program() == "tune":
        table |= torchtune_cli.recipes()
    print(f"{'RECIPE':<40} CONFIG")
    for recipe, names in table.items():
        for i, name in enumerate(names or ["<>"]):
            print(f"{recipe if i == 0 else '':<40} {name}")
    return 0


def _cp(args: argparse.Namespace) -> int:
    source, to = config_file(args.name), args.destination
    if to.is_dir():
        to /= source.name
    elif to.suffix not in (".yaml", ".yml"):
        to = to.with_name(f"{to.name}.yaml")
    if args.no_clobber and to.exists():
        print(f"{to} is there already and stays as it is")
        return 0
    if args.make_parents:
        to.parent.mkdir(parents=True, exist_ok=True)
    if not to.parent.is_dir():
        raise ConfigError(f"{to.parent} is not a folder; --make-parents makes it.")
    shutil.copyfile(source, to)
    print(f"Copied {args.name} to {to}")
    return 0
