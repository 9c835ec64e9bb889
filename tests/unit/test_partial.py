"""Rollouts in parts, with an engine that counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from actors.continuation import generate_in_parts
from tora.types import Completion, SampleRequest, Sampling

PROMPT = (7, 8, 9)


class CountingEngine:
    """Token n of a sequence is n, and token `stop - 1` ends it. Each call runs under the next version."""

    def __init__(self, stop: int) -> None:
        self.stop, self.calls = stop, list[list[SampleRequest]]()

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        self.calls.append(list(requests))
        assert len({r.sampling for r in requests}) <= 1
        return [[self._completion(len(r.token_ids) - len(PROMPT), r)] * r.num_samples for r in requests]

    def _completion(self, start: int, r: SampleRequest) -> Completion:
        ids = np.arange(start, min(start + r.sampling.max_tokens, self.stop))
        return Completion(
            ids, *[-ids.astype(np.float32)] * 2, np.full(len(ids), len(self.calls)), ids[-1] == self.stop - 1
        )


@pytest.mark.parametrize("part", [1, 4, 7, 30, None])
def test_parts_join_to_the_result_of_one_call(part: int | None) -> None:
    asked = SampleRequest(PROMPT, 3, 5, Sampling(20))
    engine: Any = CountingEngine(21)
    (group,) = generate_in_parts(engine, [asked], part)
    for completion in group:
        assert completion.token_ids.tolist() == list(range(20))
        assert (completion.logprobs == -completion.token_ids).all() and not completion.stopped
        assert completion.versions.tolist() == [1 + n // (part or 20) for n in range(20)]
    assert len({r.seed for call in engine.calls for r in call}) == sum(len(call) for call in engine.calls)


def test_finished_sequences_are_not_continued() -> None:
    asked = SampleRequest(PROMPT, 2, 5, Sampling(20))
    engine: Any = CountingEngine(4)
    (group,) = generate_in_parts(engine, [asked], 4)
    assert len(engine.calls) == 1 and all(c.stopped for c in group)
    assert generate_in_parts(engine, [], 4) == []
