"""Stop strings for tests of both engines, found without an incremental decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

STOPS = (
    ("the answer is 4. Next", "answer", "the answer"),
    ("a</answer>b", "</answer>", "a</answer>"),
    ("one\n\ntwo", "\n\n", "one\n\n"),
    ("no stop", "zzz", "no stop"),
    ("é is it", "é", "é"),
    ("a<|im_end|>b", "<|im_end|>", "a<|im_end|>"),
)
"""Text, stop string, and what is taken."""


def cut(tokenizer: Any, ids: list[int], stops: tuple[str, ...]) -> list[int]:
    """The shortest prefix whose text has a stop string; all of it if none has."""
    for end in range(1, len(ids) + 1):
        if any(stop in tokenizer.decode(ids[:end]) for stop in stops):
            return ids[:end]
    return ids


def free_texts(tokenizer: Any, groups: list[list[list[int]]]) -> tuple[str, ...]:
    """Two strings that stand somewhere in the completions: one of a single token, and one across two tokens. Both are
    ASCII, since random bytes are seldom whole characters."""
    completions = [ids for group in groups for ids in group]
    pairs = (tokenizer.decode(ids[i : i + 2]) for ids in completions for i in range(3, len(ids) - 1))
    singles = (tokenizer.decode(ids[i : i + 1]) for ids in completions for i in range(5, len(ids)))
    return _ascii(singles, 1), _ascii(pairs, 2)


def _ascii(texts: Iterator[str], length: int) -> str:
    return next(text for text in texts if len(text) == length and text.isascii() and text.isprintable())
