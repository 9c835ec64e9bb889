"""The families of `tora.bench.families`, with the tests' tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import make_tokenizer

from tora.bench.families import FAMILIES, write_family

__all__ = ["FAMILIES", "make_family"]


def make_family(folder: Path, name: str, **changes: Any) -> Path:
    """Writes config, weights and tokenizer; returns `folder`."""
    tokenizer = make_tokenizer()
    write_family(folder, name, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **changes)
    tokenizer.save_pretrained(folder)
    return folder
