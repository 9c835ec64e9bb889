"""torchtune's own commands and recipes, with Tora's compatibility fixes in every process that they start.

As a program (`python -m tora.torchtune_cli path|module TARGET [ARGS]`) it is what a rank of torchrun runs: importing
the package installs the fixes, and the recipe follows.
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
        args.training_script, args.module = "tora.torchtune_cli", True
        return torchrun(args)

    return run


if __name__ == "__main__":
    _, how, target, *rest = sys.argv
    sys.argv = [target, *rest]
    (runpy.run_module if how == "module" else runpy.run_path)(target, run_name="__main__")
