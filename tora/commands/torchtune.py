"""torchtune's own commands and recipes. The processes they start have the import fixes: see `tora.compat`."""

from __future__ import annotations

import importlib.machinery
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

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

    Raises ConfigError if neither Tora nor torchtune has the recipe, or the config to copy.
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
    """`words`: those before `--config` except options. The last one is a recipe, or the user's own file or module."""
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
    from torchtune._cli import tune

    sys.argv = ["tune", *argv]  # torchtune reads its arguments from there, several times
    tune.main()
