"""Which prompt comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tora.types import Group, Prompt, RolloutState


class PromptCursor:
    """Prompts in the stream's order, those of an interrupted run first."""

    def __init__(self, prompt_at: Callable[[int], Prompt], state: RolloutState) -> None:
        self._prompt_at = prompt_at
        self.position = state.cursor
        self._again = list(state.pending)

    def next(self) -> Prompt:
        if self._again:
            return self._prompt_at(self._again.pop(0))
        self.position += 1
        return self._prompt_at(self.position - 1)

    def state(self, in_flight: Iterable[int], finished: Sequence[tuple[int, Group]] = ()) -> RolloutState:
        return RolloutState(self.position, sorted([*self._again, *in_flight]), list(finished))
