"""The position in the prompt stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tora.types import Group, Prompt, RolloutState


class PromptCursor:
    """Yields the prompts that an interrupted run left pending, then the stream in order."""

    def __init__(self, prompt_at: Callable[[int], Prompt], state: RolloutState) -> None:
        self._prompt_at = prompt_at
        self.position = state.cursor
        self._pending = list(state.pending)

    def next(self) -> Prompt:
        if self._pending:
            return self._prompt_at(self._pending.pop(0))
        self.position += 1
        return self._prompt_at(self.position - 1)

    def state(self, in_flight: Iterable[int], finished: Sequence[tuple[int, Group]] = ()) -> RolloutState:
        return RolloutState(self.position, sorted([*self._pending, *in_flight]), list(finished))
