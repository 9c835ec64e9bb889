"""Sums of two one-digit numbers: so few that a small pretrained model learns them in minutes."""

from __future__ import annotations

import random
from typing import Any

from tora.errors import ConfigError

_NUM_TRAIN = 60
_SPLITS = {"train": slice(_NUM_TRAIN), "test": slice(_NUM_TRAIN, None)}


def sums(split: str = "train") -> list[dict[str, str]]:
    """Rows `{prompt, answer}`: 60 of the 100 ordered pairs of digits to train on, the other 40 to test with. Score them
    with `last_number`.

    A pair's mirror image may be in the other split. Raises ConfigError if the split is unknown.
    """
    if split not in _SPLITS:
        raise ConfigError(f"sums: split is {split!r}, expected one of {', '.join(_SPLITS)}")
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random("sums").shuffle(pairs)
    return [_row(a, b) for a, b in pairs[_SPLITS[split]]]


def _row(a: int, b: int) -> dict[str, Any]:
    return {"prompt": f"What is {a} + {b}?", "answer": str(a + b)}
