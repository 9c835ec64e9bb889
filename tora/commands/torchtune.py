"""torchtune's own commands and recipes, with Tora's compatibility fixes in every process that they start.

As a program (`python -m tora.commands.torchtune path|module TARGET [ARGS]`) it is what each torchrun rank runs:
importing the package installs the fixes, and the recipe follows.
"""

from __future__ import annotations

import importlib.machinery
import re
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tora.commands.recipes import RECIPES
from tora.config.load import config_names
from tora.errors import ConfigError, nearest


def recipes() -> dict[str, list[str]]:
    """torchtune's recipes with their configs, from its registry alone: importing torchtune takes seconds."""
    spec = importlib.machinery.PathFinder.find_spec("torchtune")
    assert spec is not None and spec.submodule_search_locations is not None  # a dependency
    registry = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "_recipe_registry.py"))
    return {recipe.name: [config.name for config in recipe.configs] for recipe in registry["get_all_recipes"]()}


def owns_config(path: Path) -> bool:
    """Whether a file is a config of torchtune's, whose `model` is a component; ours names a folder instead."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    return re.search(r"^model:\s*\n(\s*#.*\n)*\s+_component_:", text, re.MULTILINE) is not None


def is_torchtunes(argv: Sequence[str]) -> bool:
    """Whether torchtune's own program answers this command line. Raises `ConfigError` for a recipe that nobody has."""
    match argv:
        case ["download" | "cat", *_]:
            return True
        case ["validate", name]:
            return owns_config(Path(name))
        case ["run", *rest] if "--config" in rest and not set(rest) & {*RECIPES, "-h", "--help"}:
            words = [word for word in rest[: rest.index("--config")] if word[0] != "-" and "=" not in word]
            known = recipes()
            if not words or words[-1] in known or "." in words[-1] or Path(f"{words[-1]}.py").exists():
                return True
            raise ConfigError(f"There is no recipe {words[-1]}{nearest(words[-1], [*RECIPES, *known])}.")
        case ["cp", name, _, *_] if not name.startswith("-") and name not in config_names():
            known = recipes()
            theirs = {*known, *(config for configs in known.values() for config in configs)}
            if name in theirs:
                return True
            raise ConfigError(f"There is no config {name} to copy{nearest(name, [*config_names(), *theirs])}.")
    return False


def delegate(argv: Sequence[str]) -> None:
    """Hand a command line to torchtune's own program."""
    from torchtune._cli import run, tune

    run.run = _through_here(run.run)
    sys.argv = ["tune", *argv]  # torchtune reads its arguments there, more than once
    tune.main()


def _through_here(torchrun: Callable[[Namespace], Any]) -> Callable[[Namespace], Any]:
    """torchrun, started on this module: its ranks are fresh interpreters, in which nothing has imported tora."""

    def run(args: Namespace) -> Any:
        how = "module" if args.module else "path"
        args.training_script_args = [how, str(args.training_script), *args.training_script_args]
        args.training_script, args.module = "tora.commands.torchtune", True
        return torchrun(args)

    return run


if __name__ == "__main__":
    _, how, target, *rest = sys.argv
    sys.argv = [target, *rest]
    (runpy.run_module if how == "module" else runpy.run_path)(target, run_name="__main__")
