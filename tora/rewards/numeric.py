"""Rewards for answers that are numbers in plain text, from models that use no tags or boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from tora.rewards.functions import Completion, text_of

_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3}){1,9}(?!\d)|\d{1,30})(?:\.\d{1,30})?")
"""Commas only between thousands; a sign only where it is no operator, so that `7-3` ends in 3. The lengths are bounded,
so that no text is expensive."""


def last_number(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1 if the last number in the completion equals the `answer` column, else 0.

    For models that answer in a sentence, `3 + 4 = 7.`; lm-evaluation-harness calls this GSM8K's flexible match.
    Raises ValueError if the column holds no number.
    """
    return [float(_last(text_of(c)) == _gold(gold)) for c, gold in zip(completions, answer, strict=True)]


def _last(text: str) -> Fraction | None:
    found = _NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


def _gold(answer: Any) -> Fraction:
    number = _last(str(answer))
    if number is None:
        raise ValueError(f"last_number: the answer column holds {answer!r}, expected a number")
    return number
