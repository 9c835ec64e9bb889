"""Recipe names that `tora run RECIPE --config CONFIG` accepts, spelled as torchtune spells them."""

from __future__ import annotations

import sys
from pathlib import Path

RECIPES = (
    "full_grpo_single_device",
    "full_grpo_distributed",
    "lora_grpo_single_device",
    "lora_grpo_distributed",
)
NO_RECIPE = "(tora run CONFIG)"
"""Printed by `ls` in place of a recipe, for configs that belong to none."""


def program() -> str:
    """The name by which the user called this program: `tune` or `tora`."""
    return "tune" if Path(sys.argv[0]).stem == "tune" else "tora"
