"""`math_answer`: where the final answer is, and what equals what."""

from __future__ import annotations

import math

import pytest

from tora.rewards import answer_tag, math_answer
from tora.rewards.final_answer import final_answer, number


def score(gold: object, final: str, **arguments: bool) -> float:
    return math_answer(["q"], [rf"so \boxed{{{final}}}"], answer=[gold], **arguments)[0]


@pytest.mark.parametrize(
    ("gold", "final", "equal"),
    [
        # a comma that separates no thousands makes a list, whose order does not matter to math-verify
        ("3,4", "34", False),
        ("34", "3,4", False),
        ("3,4", "3, 4", True),
        ("1,2", "2,1", True),
        ("1234", "12,34", False),
        ("1234", "1,2,3,4", False),
        ("1,234", r"\{1,234\}", False),
        ("1,234", "1234", True),
        ("1234", "1,234", True),
        ("1234", "1{,}234", True),
        ("1234", r"1\,234", True),
        ("1234", r"1,\!234", True),
        ("-12345678.9", "-12,345,678.90", True),
        (r"\$1,234.50", "1234.5", True),
        # math-verify alone takes all tiny numbers for equal
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),
        (r"\frac{1}{2^{99}}", "2^{-99}", True),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
        ("0.0000001", "0.0000002", False),
        ("0.333333", "1/3", True),
        # and reads an exponent as Euler's number
        ("1e-5", "0.00001", True),
        ("3.0e8", r"3\times 10^8", True),
        ("50", r"50\%", True),
        ("72", "48/2+48", True),
        ("72", "", False),
    ],
)
def test_equality(gold: str, final: str, equal: bool) -> None:
    assert score(gold, final) == equal


@pytest.mark.parametrize(
    ("gold", "final", "equal"),
    [
        ("72", "48/2+48", False),
        ("1024", "2^{10}", False),
        ("72", "72.0", True),
        ("0.5", "1/2", True),
        ("0.5", r"\frac{1}{2}", True),
        ("0.75", r"\frac34", True),
        ("0.5", r"50\%", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
    ],
)
def test_an_evaluated_answer_is_a_number_where_the_key_is_one(gold: str, final: str, equal: bool) -> None:
    assert score(gold, final, evaluated=True) == equal


@pytest.mark.parametrize(
    ("text", "final"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"$\boxed 42$", "42"),
        (r"\boxed 42.", "42"),
        (r"\fbox{42}", "42"),
        (r"\boxed{\boxed{42}}", "42"),
        ("<answer>**42**</answer>", "42"),
        ("<answer>\n42\n</answer>", "42"),
        (r"<answer>it is \boxed{42}</answer>", "42"),
        ("#### 42", "42"),
        ("#### 41\nno:\n#### 42\n", "42"),
        # the later one counts, whichever it is
        (r"first \boxed{41}, no: <answer>42</answer>", "42"),
        (r"<answer>41</answer> that is, \boxed{42}", "42"),
        (r"\boxed{42}" "\n#### Explanation", "42"),
        ("<answer>42</answer>\n#### 41", "42"),
        (r"\boxed{41} \boxed{42", None),
        ("42", None),
        ("", None),
    ],
)
def test_final_answer(text: str, final: str | None) -> None:
    assert final_answer(text) == final


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (3, "3", "4"),
        (3.0, "3", "4"),
        (2.5, "2.5", "2"),
        (1e-5, "0.00001", "0"),
        (["18", "eighteen"], "18", "19"),
        ("#### 18", "18", "19"),
    ],
)
def test_keys_of_other_types(gold: object, right: str, wrong: str) -> None:
    assert (score(gold, right), score(gold, wrong)) == (1, 0)


def test_answer_tag_takes_the_text_of_whole_floats_and_lists() -> None:
    texts = ["<answer>3</answer>"] * 3
    assert answer_tag(["q"] * 3, texts, answer=[3.0, ["4", "3"], 3.5]) == [1, 1, 0]


@pytest.mark.parametrize("gold", [None, math.nan, {"ground_truth": "3"}, [], [None]])
@pytest.mark.parametrize("function", [math_answer, answer_tag])
def test_a_key_without_an_answer_is_refused(gold: object, function) -> None:
    with pytest.raises(ValueError, match="the answer column holds"):
        function(["q"], [r"\boxed{None}"], answer=[gold])


@pytest.mark.parametrize("text", ["9" * 10_000, "1," + "000," * 5_000 + "000", "1e99999", "", ".", "e5", "1,2e3"])
def test_a_number_is_bounded(text: str) -> None:
    assert number(text) is None
