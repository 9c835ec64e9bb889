"""Rollouts in the process of the learner, which a batch that cannot be finished leaves without loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fakes import make_prompt
from pools import config
from test_worker import OneTokenEngine, make_worker

from actors.local import LocalRollouts
from tora.distributed.process_group import World
from tora.errors import RolloutError
from tora.types import Completion, Prompt, RolloutState, SampleRequest


class Breaking(OneTokenEngine):
    def __init__(self, *calls: int) -> None:
        """`calls`: those that fail, from 1."""
        self._breaks, self._calls = calls, 0

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        self._calls += 1
        if self._calls in self._breaks:
            raise RolloutError("the engine broke")
        return super().generate(requests)

    def sleep(self) -> None: ...


def prompt_at(number: int) -> Prompt:
    if number == 60:
        raise OSError("the row is unreadable")
    prompt = make_prompt(number)
    return Prompt(prompt.id, prompt.token_ids, prompt.source, {"answer": "a secret answer"})


def make(engine: Any, state: RolloutState) -> LocalRollouts:
    return LocalRollouts(config(0, batch_size=4), make_worker(engine), prompt_at, [], state, World())


def test_a_batch_that_cannot_be_finished_is_begun_again_by_a_resumed_run() -> None:
    """All rewards are equal, so that each batch has three rounds: the groups of the first two are replaced."""
    rollouts = make(Breaking(5), RolloutState(9, [7, 2]))
    trained = list(rollouts.next_batch(0, lambda: False).prompt_ids)
    state = rollouts.state()
    assert not state.pending and len(trained) == 4
    with pytest.raises(RolloutError, match="broke"):
        rollouts.next_batch(1, lambda: False)
    again = rollouts.state()
    assert again.pending == list(range(state.cursor, again.cursor)) and again.cursor == state.cursor + 8
    resumed = make(Breaking(), again)
    with pytest.raises(OSError, match="unreadable"):
        while True:
            trained += resumed.next_batch(1, lambda: False).prompt_ids
    last = resumed.state()
    assert last.cursor == 60, "its turn comes again"
    assert {*last.pending} == {*range(min(last.pending), last.cursor)} and not {*trained} & {*last.pending}
