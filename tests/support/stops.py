"""Stop strings for tests of both engines, found without an incremental decoder."""

from __future__ import annotations

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
    """Two strings that stand somewhere in the completions: one of a single token, and one across two tokens."""
    first, second = groups[0][0], groups[-1][-1]
    pairs = (tokenizer.decode(second[i : i + 2]) for i in range(3, len(second) - 1))
    across = next(text for text in pairs if "\ufffd" not in text and len(text) > 1)
    single = next(text for i in range(5, len(first)) if "\ufffd" not in (text := tokenizer.decode(first[i : i + 1])))
    return single, across
