"""Guess a number: an environment whose answers lead the model on, turn by turn."""

from __future__ import annotations

import random
from typing import Any

from tora.errors import ConfigError


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


def guess_number(num_rows: int = 1024, highest: int = 100, seed: int = 0) -> list[dict[str, Any]]:
    """Rows `{prompt, answer, highest}` for `environment_factory: {_component_: tora.tasks.guess_number.GuessNumber}`
    and the reward `tora.environments.get_reward`. Raises `ConfigError` for no rows or no numbers."""
    if num_rows < 1 or highest < 1:
        raise ConfigError(f"guess_number: num_rows={num_rows} and highest={highest}, expected both to be at least 1")
    rng = random.Random(f"guess_number/{seed}")
    prompt = "Guess my number."
    return [{"prompt": prompt, "answer": rng.randint(1, highest), "highest": highest} for _ in range(num_rows)]
