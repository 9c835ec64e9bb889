"""Guess a number: an environment whose answers lead the model on, turn by turn.

A hash of a game decides its split, as in `tora.tasks.chain_sum`.
"""

from __future__ import annotations

import random
from typing import Any

from tora.errors import ConfigError
from tora.tasks.chain_sum import is_held_out

_SPLITS = ("train", "test")


class GuessNumber:
    """Knows a number. The reward is 1 if the model has guessed it, however often it tried."""

    def reset(self, *, answer: int, highest: int, **row: Any) -> str:
        self._secret, self._is_solved = int(answer), False
        return f" It is between 1 and {highest}."

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess.
        """
        number = int(number)
        self._is_solved |= number == self._secret
        return "correct" if number == self._secret else "higher" if number < self._secret else "lower"

    def get_reward(self) -> float:
        return float(self._is_solved)


PROMPT = "Guess my number."


def draw(rng: random.Random, split: str, lowest: int = 24, highest: int = 31) -> tuple[int, int]:
    """A game of the split: the largest number allowed, between `lowest` and `highest`, and the number to guess."""
    while True:
        most = rng.randint(lowest, highest)
        secret = rng.randint(1, most)
        if is_held_out(f"{PROMPT} {most} {secret}") == (split == "test"):
            return most, secret


def guess_number(
    split: str = "train", num_rows: int = 4096, lowest: int = 24, highest: int = 31, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows `{prompt, answer, highest}` for `environment_factory: {_component_: tora.tasks.guess_number.GuessNumber}`
    and the reward `tora.environments.get_reward`. The numbers end between `lowest` and `highest`; the best player
    needs five guesses for up to 31. Raises `ConfigError` for an unknown split, no rows or no numbers."""
    if split not in _SPLITS:
        raise ConfigError(f"guess_number: split is {split!r}, expected one of {', '.join(_SPLITS)}")
    if num_rows < 1:
        raise ConfigError(f"guess_number: num_rows is {num_rows}, expected at least 1")
    if not 10 <= lowest <= highest:
        raise ConfigError(f"guess_number: lowest={lowest} and highest={highest}, expected 10 <= lowest <= highest")
    rng = random.Random(f"guess_number/{split}/{seed}")
    games = (draw(rng, split, lowest, highest) for _ in range(num_rows))
    return [{"prompt": PROMPT, "answer": secret, "highest": most} for most, secret in games]
