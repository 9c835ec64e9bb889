"""Chained sums of one-digit numbers, as in reasoning-gym: a task that a model with half a million weights can learn.

A hash of the question decides its split, so no seed can put a held-out problem into training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tora.errors import ConfigError
from tora.tasks.drawn import DrawnRows, Row

PREFIX = "State the final answer to the following arithmetic problem: "
_SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """Terms from 1 to 9 with `+` or `-` between them."""

    terms: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def question(self) -> str:
        rest = "".join(f" {o} {t}" for o, t in zip(self.operators, self.terms[1:], strict=True))
        return f"{PREFIX}{self.terms[0]}{rest} ="

    def worked(self) -> list[str]:
        """The solution, one line per operator: `9 + 3 = 12`, `12 - 5 = 7`."""
        total, lines = self.terms[0], []
        for operator, term in zip(self.operators, self.terms[1:], strict=True):
            after = total + term if operator == "+" else total - term
            lines.append(f"{total} {operator} {term} = {after}")
            total = after
        return lines

    @property
    def answer(self) -> int:
        return self.terms[0] + sum(t if o == "+" else -t for o, t in zip(self.operators, self.terms[1:], strict=True))


def is_held_out(question: str) -> bool:
    """Whether a question is in the test split: one in ten is, the same ones on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 10 == 0


def draw(rng: random.Random, split: str, min_terms: int = 3, max_terms: int = 5) -> Problem:
    """One problem of a split, uniform over lengths, terms and operators."""
    while True:
        n = rng.randint(min_terms, max_terms)
        terms = tuple(rng.randint(1, 9) for _ in range(n))
        problem = Problem(terms, tuple(rng.choice("+-") for _ in range(n - 1)))
        if is_held_out(problem.question) == (split == "test"):
            return problem


def chain_sum(
    split: str = "train", num_rows: int = 4096, min_terms: int = 3, max_terms: int = 5, seed: int = 0
) -> Sequence[Row]:
    """Rows `{prompt, answer}`, drawn independently, so short problems may repeat. Score them with `answer_tag`.

    Raises ConfigError if the split is unknown, there are no rows, or problems have fewer than two terms.
    """
    if split not in _SPLITS:
        raise ConfigError(f"chain_sum: split is {split!r}, expected one of {', '.join(_SPLITS)}")
    if num_rows < 1:
        raise ConfigError(f"chain_sum: num_rows is {num_rows}, expected at least 1")
    if not 2 <= min_terms <= max_terms:
        raise ConfigError(
            f"chain_sum: min_terms={min_terms} and max_terms={max_terms}, expected 2 <= min_terms <= max_terms"
        )
    rng = random.Random(f"chain_sum/{split}/{seed}")
    return DrawnRows(num_rows, rng, partial(_row, split=split, min_terms=min_terms, max_terms=max_terms))


def _row(rng: random.Random, split: str, min_terms: int, max_terms: int) -> Row:
    problem = draw(rng, split, min_terms, max_terms)
    return {"prompt": problem.question, "answer": str(problem.answer)}
