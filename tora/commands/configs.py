"""`tora validate`, `tora ls` and `tora cp`: check, list and copy configs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tora.commands import torchtune
from tora.commands.listing import listing
from tora.commands.recipes import NO_RECIPE, RECIPES, program
from tora.errors import ConfigError


def add_parsers(commands: Any) -> None:
    validate = commands.add_parser(
        "validate",
        help="check configs without running them",
        epilog="examples:\n  %(prog)s mine.yaml optimizer.lr=1e-5\n  %(prog)s --deep mine.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    validate.add_argument("configs", nargs="+", metavar="CONFIG|key=value")
    validate.add_argument(
        "--deep", action="store_true", help="also load tokenizer, data and rewards, and score the first prompt"
    )
    validate.set_defaults(command=validate_command)

    ls = commands.add_parser("ls", help="list recipes and configs")
    ls.set_defaults(command=_ls)

    cp = commands.add_parser("cp", help="copy a config to edit it")
    cp.add_argument("name", help="config, as listed by `ls`")
    cp.add_argument("destination", type=Path, help="folder or file")
    cp.add_argument("-n", "--no-clobber", action="store_true", help="do not fail if the file exists")
    cp.add_argument("--make-parents", action="store_true", help="create missing folders")
    cp.set_defaults(command=_cp)


def validate_command(args: argparse.Namespace) -> int:
    from tora.config.load import load_config, missing_folders

    names = [word for word in args.configs if "=" not in word]
    overrides = [word for word in args.configs if "=" in word]
    if not names:
        raise ConfigError("Name at least one config to validate; there are only overrides.")
    code = 0
    for name in names:
        try:
            cfg = load_config(name, overrides)
            notes = missing_folders(cfg)
            print(f"{name}: OK{''.join(f' ({note})' for note in notes)}")
            if args.deep:
                from tora.commands.deep import look

                for line in look(cfg):
                    print(f"  {line}")
        except ConfigError as error:  # the other configs are still checked
            print(f"{name}: {error}", file=sys.stderr)
            code = 2
    return code


def _ls(args: argparse.Namespace) -> int:
    """Lists our configs; under the name `tune` in torchtune's form, by recipe, together with torchtune's own.

    A config belongs to the recipe whose name, without `_distributed`, ends the config's name.
    """
    from tora.config.load import config_names

    if program() != "tune":
        from tora.config.load import configs_dir

        print("\n".join(listing(config_names(), configs_dir())))
        return 0
    table: dict[str, list[str]] = {recipe: [] for recipe in (*RECIPES, NO_RECIPE)}
    for name in config_names():
        of = (recipe for recipe in RECIPES if name.endswith(recipe.removesuffix("_distributed")))
        table[next(of, NO_RECIPE)].append(name)
    table |= torchtune.recipes()
    print(f"{'RECIPE':<40} CONFIG")
    for recipe, names in table.items():
        for i, name in enumerate(names or ["<>"]):
            print(f"{recipe if i == 0 else '':<40} {name}")
    return 0


def _cp(args: argparse.Namespace) -> int:
    import shutil

    from tora.config.load import config_file

    source, to = config_file(args.name), args.destination
    if to.is_dir():
        to /= source.name
    elif to.suffix not in (".yaml", ".yml"):
        to = to.with_name(f"{to.name}.yaml")
    if to.exists():
        if args.no_clobber:
            print(f"{to} exists and is left as it is")
            return 0
        raise ConfigError(f"{to} exists; choose another name, or delete it first.")
    if args.make_parents:
        to.parent.mkdir(parents=True, exist_ok=True)
    if not to.parent.is_dir():
        raise ConfigError(f"{to.parent} is not a folder; --make-parents creates it.")
    shutil.copyfile(source, to)
    print(f"Copied {args.name} to {to}")
    return 0
