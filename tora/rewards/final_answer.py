"""The final answer of a completion, and whether it equals the answer key.

It may stand as verl's and math-verify's extractors read it, `\\boxed{42}`, `\\fbox{42}` and `\\boxed 42`, in
`<answer>` tags, and after GSM8K's `####`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

from tora.rewards import math_judge

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{| +(?=[^\s{]))")
_HASHES = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)
_BOLD = re.compile(r"\*\*(.+?)\*\*|__(.+?)__", re.DOTALL)
_LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3})")
_NUMBER = re.compile(r"[-+]?((\d{1,3}(,\d{3}){1,9}|\d{1,30})(\.\d{1,30})?|\.\d{1,30})([eE][-+]?\d{1,3})?")
"""Commas only between thousands: `3,4` is a list. The lengths are bounded, so that no answer is expensive."""
_PERCENT = re.compile(r"\s*\\?%$")
_FRACTION = re.compile(r"[-+]?(\d{1,30}/\d{1,30}|\\[dt]?frac\s*(\{-?\d{1,30}\}|\d)\s*(\{-?\d{1,30}\}|\d))")


def final_answer(text: str) -> str | None:
    """The content of the last box or `<answer>` tag, whichever ends the text later; None if there is neither.

    A box within the last tag is opened. A line that starts with `####` counts if there is no box and no tag. A box that
    is never closed is no answer, and neither is any before it.
    """
    tags = list(_TAG.finditer(text))
    after_tags = tags[-1].end() if tags else 0
    boxes = list(_BOX.finditer(text))
    if boxes and boxes[-1].start() >= after_tags:
        return _box_content(text, boxes[-1])
    if tags:
        inside = tags[-1][1]
        return _unwrapped(_box_content(inside, box) if (box := _last(_BOX.finditer(inside))) else inside)
    hashes = _last(_HASHES.finditer(text))
    return _unwrapped(hashes[1]) if hashes else None


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    return next(reversed(list(matches)), None)


def _box_content(text: str, box: re.Match[str]) -> str | None:
    """The content of the box that opens at `box`; without braces, the text up to a space, a dollar sign or the end."""
    if not box[0].endswith("{"):
        return re.split(r"[\s$]", text[box.end() :], maxsplit=1)[0].rstrip(".,;") or None
    depth = 1
    for end in range(box.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return _unwrapped(text[box.end() : end])
    return None


def _unwrapped(text: str | None) -> str | None:
    """Without white space and Markdown's bold around it."""
    if text is None:
        return None
    bold = _BOLD.fullmatch(text.strip())
    return (bold[1] or bold[2] if bold else text).strip()


def accepted(gold: Any) -> list[str]:
    """The texts that an answer key accepts: itself, the final answer that it contains, or each of a list's items.

    Raises ValueError if the key holds no answer: None, NaN, a dict, or an empty list.
    """
    if isinstance(gold, list | tuple):
        texts = [text for each in gold for text in accepted(each)]
        if texts:
            return texts
    elif isinstance(gold, float) and gold.is_integer():
        return [str(int(gold)), str(gold)]  # Arrow makes floats of a column with whole numbers and others
    elif gold is not None and not isinstance(gold, dict) and not (isinstance(gold, float) and math.isnan(gold)):
        return [str(gold)]
    raise ValueError(f"the answer column holds {gold!r}; expected text, a number, or a list of accepted answers")


def equals(gold: str, final: str, *, evaluated: bool = False) -> bool:
    """Whether two answers are equal: as text, as numbers, or by math-verify if they are not both numbers.

    `evaluated`: a number equals only a number or a fraction, not a calculation that comes to it.
    """
    gold = final_answer(gold) or gold
    if gold == final:
        return True
    numbers = [number(gold), number(final)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    if evaluated and numbers[0] is not None and not _is_evaluated(final):
        return False
    return math_judge.shared.equal(*(f"\\boxed{{{_decimal(text)}}}" for text in (gold, final)))


def number(text: str) -> Fraction | None:
    """A plain number, with or without separators between thousands and a dollar sign; None for other text."""
    plain = _bare(text)
    return Fraction(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


def _is_evaluated(text: str) -> bool:
    """Whether it is a number, a fraction, or a percentage."""
    plain = _PERCENT.sub("", _bare(text))
    return number(plain) is not None or _FRACTION.fullmatch(plain) is not None


def _bare(text: str) -> str:
    plain = text.strip().rstrip(".").replace("\\$", "").replace("$", "").strip()
    return _LATEX_COMMA.sub(",", plain)


def _decimal(text: str) -> str:
    """A number in exponent notation, written out for math-verify; other text as it is."""
    plain = _bare(text)
    is_scientific = "e" in plain.lower() and number(text) is not None
    return format(Decimal(plain.replace(",", "")), "f") if is_scientific else text
