"""The names that `tora run RECIPE --config CONFIG` takes, as torchtune spells recipes."""

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
"""How `ls` heads the configs that belong to no recipe."""


def program() -> str:
    """The name that the user called this program by."""
    return "tune" if Path(sys.argv[0]).stem == "tune" else "tora"
