"""A digit to read in a picture that is too small to read it, with a tool that shows a part of it enlarged.

The digits are those of `tora.tasks.digits`, in its splits.
"""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING, Any

from tora.errors import ConfigError
from tora.models.vision.parts import encoded
from tora.tasks.digits import draw, picture, values

if TYPE_CHECKING:
    from PIL.Image import Image

PLACES = ("top left", "top right", "bottom left", "bottom right")
_SPLITS = ("train", "test")
_SIDE = 32
"""Pixels of the small picture's sides."""


def question_of(place: str) -> str:
    return f"Which digit is at the {place}?"


def enlarged(index: int) -> Image:
    """One scan, 64 x 64 pixels."""

    from PIL import Image

    return Image.open(io.BytesIO(picture((index,))))


def overview(indices: tuple[int, ...]) -> bytes:
    """A PNG of four scans in two rows, 32 x 32 pixels in all."""
    from PIL import Image

    whole = Image.new("L", (2 * 64, 2 * 64))
    for number, index in enumerate(indices):
        whole.paste(enlarged(index), (64 * (number % 2), 64 * (number // 2)))
    return encoded(whole.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


class DigitsLookup:
    """Shows one of the four digits, as often as it is asked."""

    def reset(self, *, indices: tuple[int, ...], **row: Any) -> None:
        self._indices = tuple(indices)

    def look(self, place: str) -> Any:
        """
        Look at a part of the picture.

        Args:
            place: top left, top right, bottom left or bottom right.
        """
        if place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}")
        return enlarged(self._indices[PLACES.index(place)])


class _Rows:
    """Rows `{prompt, images, indices, answer}`. A row's image is made when the row is read."""

    def __init__(self, split: str, num_rows: int, seed: int) -> None:
        rng = random.Random(f"digits_lookup/{split}/{seed}")
        self._drawn = [(draw(rng, split, len(PLACES)), rng.randrange(len(PLACES))) for _ in range(num_rows)]

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, index: int) -> dict[str, Any]:
        indices, asked = self._drawn[index]
        parts = [{"type": "image"}, {"type": "text", "text": question_of(PLACES[asked])}]
        prompt = [{"role": "user", "content": parts}]
        answer = str(values(indices)[asked])
        return {"prompt": prompt, "images": [overview(indices)], "indices": indices, "answer": answer}


def digits_lookup(split: str = "train", num_rows: int = 4096, seed: int = 0) -> _Rows:
    """Rows for `environment_factory: {_component_: tora.tasks.digits_lookup.DigitsLookup}`. Score with `answer_tag`.

    Raises ConfigError for an unknown split or no rows.
    """
    if split not in _SPLITS:
        raise ConfigError(f"digits_lookup: split is {split!r}, expected one of {', '.join(_SPLITS)}")
    if num_rows < 1:
        raise ConfigError(f"digits_lookup: num_rows is {num_rows}, expected at least 1")
    return _Rows(split, num_rows, seed)
