"""One-digit sums, and the reward for answers that are numbers in a sentence."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tora import rewards
from tora.errors import ConfigError
from tora.tasks.sums import sums


def test_the_splits_share_no_question_and_hold_every_pair() -> None:
    train, test = sums(), sums("test")
    assert (len(train), len(test)) == (60, 40)
    assert len({row["prompt"] for row in (*train, *test)}) == 100
    for row in (*train, *test):
        terms = row["prompt"].removeprefix("What is ").removesuffix("?").split(" + ")
        assert sum(map(int, terms)) == int(row["answer"])


def test_the_splits_are_the_same_in_every_process() -> None:
    code = "from tora.tasks.sums import sums; print(sums('test')[:3])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(sums("test")[:3])


def test_an_unknown_split() -> None:
    with pytest.raises(ConfigError, match="split is 'held_out', expected one of train, test"):
        sums("held_out")


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("7", "3 + 4 = 7.", 1),
        ("7", "7", 1),
        ("7", "The answer is 7, of course", 1),
        ("7", "7 is what 3 + 4 makes", 0),
        ("7", "3 + 4 = 7.5", 0),
        ("7", "3 + 4 = 17", 0),
        ("7", "seven", 0),
        ("7", "", 0),
        (7, "7.0", 1),
        ("-7", "3 - 10 = -7", 1),
        ("7", "3 - 10 = -7", 0),
        ("3", "10-7=3", 1),
        ("7", "10 -7", 0),
        ("7", "10-7", 1),
        ("1234", "1,234 apples", 1),
        ("234", "1,234 apples", 0),
        ("2", "the pair 1,2", 1),
        ("#### 42", "so it is 42", 1),
        ("7", "9" * 100_000, 0),
    ],
)
def test_last_number(gold: Any, text: str, score: float) -> None:
    assert rewards.last_number(["q"], [text], answer=[gold]) == [score]
    assert rewards.last_number(["q"], [[{"role": "assistant", "content": text}]], answer=[gold]) == [score]


@pytest.mark.parametrize("gold", [None, float("nan"), float("inf"), "", "seven"])
def test_an_answer_column_without_a_number(gold: Any) -> None:
    with pytest.raises(ValueError, match="expected a number"):
        rewards.last_number(["q"], ["7"], answer=[gold])
