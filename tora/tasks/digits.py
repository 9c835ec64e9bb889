"""Handwritten digits to read or add: scikit-learn's 1,797 scans of 8 x 8 grey values, one or two per image.

Every fourth scan is held out, so no seed can put one of those into training.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import numpy as np

from tora.errors import ConfigError
from tora.tasks.image_rows import encoded

QUESTIONS = {1: "Which digit is this?", 2: "What is the sum of the two digits?"}
_SPLITS = ("train", "test")
_SCALE = 8


class Digits:
    """Rows `{prompt, images, answer}`, drawn independently. A row's image is made when the row is read."""

    def __init__(self, split: str, num_rows: int, count: int, seed: int) -> None:
        rng = random.Random(f"digits/{split}/{count}/{seed}")
        self.draws = [draw(rng, split, count) for _ in range(num_rows)]
        """Indices of the scans in each row."""

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: int) -> dict[str, Any]:
        indices = self.draws[index]
        parts = [{"type": "image"}, {"type": "text", "text": QUESTIONS[len(indices)]}]
        prompt = [{"role": "user", "content": parts}]
        return {"prompt": prompt, "images": [picture(indices)], "answer": str(sum(values(indices)))}


def digits(split: str = "train", num_rows: int = 4096, count: int = 2, seed: int = 0) -> Digits:
    """`count` digits side by side: one to read, or two to add. Score with `answer_tag`.

    Raises ConfigError if the split is unknown, there are no rows, or `count` is neither 1 nor 2.
    """
    if split not in _SPLITS:
        raise ConfigError(f"digits: split is {split!r}, expected one of {', '.join(_SPLITS)}")
    if num_rows < 1:
        raise ConfigError(f"digits: num_rows is {num_rows}, expected at least 1")
    if count not in QUESTIONS:
        raise ConfigError(f"digits: count is {count}, expected 1 or 2")
    return Digits(split, num_rows, count, seed)


def draw(rng: random.Random, split: str, count: int) -> tuple[int, ...]:
    """Indices of `count` scans of a split, drawn uniformly."""
    pool = pictures_of(split)
    return tuple(rng.choice(pool) for _ in range(count))


@lru_cache
def pictures_of(split: str) -> tuple[int, ...]:
    """Indices of a split's scans: 1,347 for `train`, 450 for `test`."""
    held_out = split == "test"
    return tuple(i for i in range(len(_load()[1])) if (i % 4 == 0) == held_out)


def values(indices: tuple[int, ...]) -> list[int]:
    """The digits that the scans show."""
    labels = _load()[1]
    return [int(labels[i]) for i in indices]


@lru_cache(maxsize=2048)
def picture(indices: tuple[int, ...]) -> bytes:
    """A PNG of the scans from left to right, 64 x 64 pixels each."""
    from PIL import Image

    grey_HW = np.concatenate([_load()[0][i] for i in indices], axis=1)
    small = Image.fromarray((grey_HW * 255 / 16).astype(np.uint8))
    size = small.width * _SCALE, small.height * _SCALE
    return encoded(small.resize(size, Image.Resampling.BILINEAR))


@lru_cache(maxsize=1)
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Scans, [1797, 8, 8] with values from 0 to 16, and labels, [1797]."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images, bunch.target
