"""The position in the prompt stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tora.errors import OverlongPrompt
from tora.types import Group, Prompt, RolloutState


class PromptCursor:
    """Yields the prompts that an interrupted run left pending, then the stream in order."""

    def __init__(self, prompt_at: Callable[[int], Prompt], state: RolloutState) -> None:
        self._prompt_at = prompt_at
        self.position = state.cursor
        self._pending = list(state.pending)
        self._dropped = 0

    def next(self) -> Prompt:
        """The next prompt that is not dropped. Raises what the stream raises, and then stays where it is."""
        while True:
            position = self._pending.pop(0) if self._pending else self._advance()
            try:
                return self._prompt_at(position)
            except OverlongPrompt:
                self._dropped += 1
            except BaseException:
                self._pending.insert(0, position)
                raise

    def _advance(self) -> int:
        self.position += 1
        return self.position - 1

    def take_dropped(self) -> int:
        """Prompts dropped since the last call."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def state(self, in_flight: Iterable[int], finished: Sequence[tuple[int, Group]] = ()) -> RolloutState:
        return RolloutState(self.position, sorted([*self._pending, *in_flight]), list(finished))
