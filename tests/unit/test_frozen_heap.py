"""Python's garbage collector while a run trains."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeLearner, make_run

from tora.errors import LearnerLost
from tora.run.frozen_heap import frozen_heap
from tora.run.loop import train
from tora.types import StepResult, TrainBatch


class Cycle:
    def __init__(self) -> None:
        self.itself = self


class Looking(FakeLearner):
    """Notes in each step how many objects are left alone."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.frozen: list[int] = []

    def step(self, batch: TrainBatch) -> StepResult:
        self.frozen.append(gc.get_freeze_count())
        return super().step(batch)


def test_a_run_trains_on_a_frozen_heap(tmp_path: Path) -> None:
    frozen, thresholds, learner = gc.get_freeze_count(), gc.get_threshold(), Looking()
    train(make_run(tmp_path, [learner]))
    assert learner.frozen and min(learner.frozen) > frozen + 10_000
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, thresholds)


def test_a_run_that_fails_leaves_none(tmp_path: Path) -> None:
    thresholds = gc.get_threshold()
    with pytest.raises(LearnerLost):
        train(make_run(tmp_path, [Looking(dies_in=1)]))
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, thresholds)


def test_garbage_from_before_and_from_meanwhile_is_freed() -> None:
    before, kept = Cycle(), Cycle()
    old, held = weakref.ref(before), weakref.ref(kept)
    del before
    with frozen_heap():
        assert old() is None
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None
        del kept
        gc.collect()
        assert held() is not None, "it is not searched"
    gc.collect()
    assert held() is None
