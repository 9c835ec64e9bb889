"""Torchtune-LoRA for RL: GRPO that trains an adapter, synchronously or asynchronously."""

import importlib
from typing import Any

from tora import compat

_LAZY = {"GRPOConfig": "tora.trainer.arguments", "GRPOTrainer": "tora.trainer.trainer"}

compat.install()
compat.quieten()


def __getattr__(name: str) -> Any:
    """Imports the names for programs in Python when they are asked for, so that the command line starts at once."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
