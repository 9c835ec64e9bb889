"""What a reward function prints, passed on and kept."""

from __future__ import annotations

import io
from typing import TextIO

_MOST_LINES = 200
"""Of one call: a function that prints in a loop must not fill the run's messages."""


class Printed(io.TextIOBase):
    """Stands in for `sys.stdout` in a process for reward functions."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._kept = stream, io.StringIO()

    def write(self, text: str, /) -> int:
        self._kept.write(text)
        self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def take(self) -> list[str]:
        """The lines printed since the last call; of many, the first ones and their number."""
        self._stream.flush()
        lines, self._kept = self._kept.getvalue().splitlines(), io.StringIO()
        left_out = len(lines) - _MOST_LINES
        return lines if left_out <= 0 else [*lines[:_MOST_LINES], f"... and {left_out} lines more"]
