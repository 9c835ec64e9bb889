"""Reward functions with TRL's signature: `f(prompts, completions, **columns) -> list[float | None]`.

Every argument is a list with one entry per completion. `prompts` and `completions` are strings if the dataset's prompts
are strings, and lists of chat messages otherwise. All other dataset columns are passed by name. A function with a
parameter `completion_ids` also gets the token ids of each completion, including an end-of-text token. A score of None
means that the function does not apply to the completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tora.rewards.final_answer import accepted, equals, final_answer

Completion = str | list[dict[str, Any]]

_ANSWER_AT_END = re.compile(r"<answer>([^<]*)</answer>\s*\Z")
ONE_ANSWER_AT_END = r"((?!</?answer>).)*<answer>((?!</?answer>).)+</answer>"


def text_of(completion: Completion) -> str:
    """The text of a completion, which is a string or a list of chat messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def answer_tag(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1 if the completion ends in `<answer>X</answer>` and X is the text of the `answer` column, else 0.

    A list in the column holds several right answers, and `3` also equals 3.0. Raises ValueError if the column holds
    None, NaN, a dict or an empty list.
    """
    matches = [_ANSWER_AT_END.search(text_of(c)) for c in completions]
    golds = [[text.strip() for text in accepted(gold)] for gold in answer]
    return [float(match is not None and match[1].strip() in texts) for match, texts in zip(matches, golds, strict=True)]


def math_answer(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    evaluated: bool = False,
    **columns: Any,
) -> list[float]:
    """1 if the final answer equals the `answer` column mathematically (`1/2`, `0.5`, `\\frac{1}{2}`), else 0.

    The final answer is the content of the last `\\boxed{}` or `<answer>` tag, whichever comes later, or follows `####`
    if there is neither; see `tora.rewards.final_answer`. A completion without any scores 0, and so does one whose
    comparison takes more than 5 s of CPU time. A list in the column holds answers of which each is right.

    A calculation such as `48/2+48` equals 72, as for math-verify. With `evaluated` it does not: an answer to a column
    that holds a number must then be a number or a fraction.

    Raises ValueError if the column holds None, NaN, a dict or an empty list.
    """
    finals = [final_answer(text_of(c)) for c in completions]
    golds = [accepted(gold) for gold in answer]
    return [
        float(final is not None and any(equals(gold, final, evaluated=evaluated) for gold in texts))
        for final, texts in zip(finals, golds, strict=True)
    ]


def format(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    pattern: str = ONE_ANSWER_AT_END,
    **columns: Any,
) -> list[float]:
    """1 if the regular expression `pattern` matches the whole completion, else 0.

    Surrounding whitespace is ignored, and `.` also matches newlines. The default pattern requires exactly one
    `<answer>` tag, at the end.
    """
    shape = re.compile(pattern, re.DOTALL)
    return [float(shape.fullmatch(text_of(c).strip()) is not None) for c in completions]


def length(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    target: int,
    limit: int | None = None,
    **columns: Any,
) -> list[float]:
    """1 up to `target` characters, then falling linearly to 0 at `limit` characters (default: twice `target`).

    Raises ValueError if not 0 < target < limit.
    """
    limit = 2 * target if limit is None else limit
    if not 0 < target < limit:
        raise ValueError(f"length: target={target} and limit={limit}, expected 0 < target < limit")
    over = [(limit - len(text_of(c))) / (limit - target) for c in completions]
    return [min(1.0, max(0.0, share)) for share in over]


def overlong(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    buffer: int,
    **columns: Any,
) -> list[float]:
    """0 up to `max_tokens - buffer` tokens, then falling linearly to -1 at `max_tokens`, and -1 beyond.

    DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13), to be added to a task's other rewards.
    Raises ValueError if not 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"overlong: max_tokens={max_tokens} and buffer={buffer}, expected 0 < buffer <= max_tokens")
    over = [(max_tokens - buffer - len(ids)) / buffer for ids in completion_ids]
    return [max(-1.0, min(0.0, share)) for share in over]
