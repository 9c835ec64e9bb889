"""Products of two-digit numbers, with a calculator as a tool: too hard for a tiny model to work out, easy to ask for.

A hash of the question decides its split, as in `tora.tasks.chain_sum`.
"""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Callable
from typing import Any

from tora.errors import ConfigError
from tora.tasks.chain_sum import is_held_out

_SPLITS = ("train", "test")
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_LONGEST = 40
"""Characters of an expression: enough for a sum or product of several numbers, too few to make huge ones."""


def calculate(expression: str) -> str:
    """
    Work out an arithmetic expression.

    Args:
        expression: Whole numbers with +, - and * between them, and parentheses.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression is longer than {_LONGEST} characters")
    return str(_value(ast.parse(expression.strip(), mode="eval").body))


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("only whole numbers, +, -, * and parentheses are allowed")


def question_of(factors: tuple[int, int]) -> str:
    return f"What is {factors[0]} * {factors[1]} ?"


def draw(rng: random.Random, split: str) -> tuple[int, int]:
    """Two factors from 11 to 99 whose question belongs to the split."""
    while True:
        factors = rng.randint(11, 99), rng.randint(11, 99)
        if is_held_out(question_of(factors)) == (split == "test"):
            return factors


def calculator(split: str = "train", num_rows: int = 4096, seed: int = 0) -> list[dict[str, Any]]:
    """Rows `{prompt, answer}`. Use them with `tools: [tora.tasks.calculator.calculate]` and score them with
    `answer_tag`. Raises `ConfigError` for an unknown split or no rows."""
    if split not in _SPLITS:
        raise ConfigError(f"calculator: split is {split!r}, expected one of {', '.join(_SPLITS)}")
    if num_rows < 1:
        raise ConfigError(f"calculator: num_rows is {num_rows}, expected at least 1")
    rng = random.Random(f"calculator/{split}/{seed}")
    drawn = (draw(rng, split) for _ in range(num_rows))
    return [{"prompt": question_of((a, b)), "answer": str(a * b)} for a, b in drawn]
