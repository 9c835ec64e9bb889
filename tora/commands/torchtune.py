"""torchtune's own commands and recipes, with Tora's compatibility fixes in every process that they start.

`python -m tora.commands.torchtune path|module TARGET [ARGS]` is what each torchrun rank runs: importing `tora` installs
the fixes, then the recipe runs.
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
from tora.errors import ConfigError, nearest


def recipes() -> dict[str, list[str]]:
    """torchtune's recipes with their configs. Reads its registry file only, since importing torchtune takes seconds."""
    spec = importlib.machinery.PathFinder.find_spec("torchtune")
    assert spec is not None and spec.submodule_search_locations is not None, "torchtune is a dependency"
    registry = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "_recipe_registry.py"))
    return {recipe.name: [config.name for config in recipe.configs] for recipe in registry["get_all_recipes"]()}


def owns_config(path: Path) -> bool:
    """Whether a file is a torchtune config: its `model` is a component, while in ours it is a section with `path`."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    return re.search(r"^model:\s*\n(\s*#.*\n)*\s+_component_:", text, re.MULTILINE) is not None


def is_torchtunes(argv: Sequence[str]) -> bool:
    """Whether torchtune's own program handles this command line.

    Raises `ConfigError` for a recipe, or a config to copy, that neither Tora nor torchtune has.
    """
    match argv:
        case ["download" | "cat", *_]:
            return True
        case ["validate", name]:
            return owns_config(Path(name))
        case ["run", *rest] if "--config" in rest and not set(rest) & {*RECIPES, "-h", "--help"}:
            return _runs_their_recipe([word for word in rest[: rest.index("--config")] if word[0] != "-"])
        case ["cp", name, _, *_] if not name.startswith("-"):
            return _copies_their_config(name)
    return False


def _runs_their_recipe(words: Sequence[str]) -> bool:
    """`words`: those before `--config` that are no options; the last is the recipe, or a file or module of the user."""
    names, known = [word for word in words if "=" not in word], recipes()
    if not names or names[-1] in known or "." in names[-1] or Path(f"{names[-1]}.py").exists():
        return True
    raise ConfigError(f"There is no recipe {names[-1]}{nearest(names[-1], [*RECIPES, *known])}.")


def _copies_their_config(name: str) -> bool:
    from tora.config.load import config_names

    ours = config_names()
    if name in ours:
        return False
    known = recipes()
    theirs = {*known, *(config for configs in known.values() for config in configs)}
    if name in theirs:
        return True
    raise ConfigError(f"There is no config {name} to copy{nearest(name, [*ours, *theirs])}.")


def delegate(argv: Sequence[str]) -> None:
    """Run a command line with torchtune's own program."""
    from torchtune._cli import run, tune

    run.run = _through_here(run.run)
    sys.argv = ["tune", *argv]  # torchtune reads its arguments from there, several times
    tune.main()


def _through_here(torchrun: Callable[[Namespace], Any]) -> Callable[[Namespace], Any]:
    """`torchrun`, but each rank runs this module first: ranks are new interpreters that have not imported `tora`."""

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
