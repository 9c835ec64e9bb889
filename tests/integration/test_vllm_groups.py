"""Engines in a process that has, or had, a learner's process group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from learners import config
from tiny import make_text_model
from vllm_engines import request, start_engine

from learner.learner import Learner
from tora.distributed.process_group import World, join, leave


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    leave()  # of a test before
    yield
    leave()


def test_an_engine_starts_after_the_group_of_an_earlier_one_is_gone(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, num_layers=1)
    learner = Learner(config(folder, "lora"))
    for leaves_first in (False, True, None):
        if leaves_first is not None:
            join(World(), torch.device("cpu"), alone=True)
        engine = start_engine(folder)
        engine.install(learner.snapshot())
        assert engine.generate([request()])[0][0].token_ids.size
        if leaves_first:
            leave()
        engine.close()
        if leaves_first is False:
            assert dist.is_initialized(), "the group is the learner's"
            leave()
    assert not dist.is_initialized(), "the last engine's own group is gone"
