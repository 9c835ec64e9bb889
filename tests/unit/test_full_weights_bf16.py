"""Whole weights in bf16 train by float32 masters: what float32 trains, they do too, on one rank as on several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from learners import config, make_batch, make_groups
from tiny import make_text_model

from learner.learner import Learner
from tora.adapters.inject import trained_parameters
from tora.adapters.snapshot import views
from tora.distributed.process_group import leave
from tora.distributed.sharding import gather

SMALL = {"_component_": "torch.optim.AdamW", "lr": 1e-6, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    yield
    leave()


def trained(folder: Path, dtype: str, steps: int) -> tuple[Learner, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A learner after its steps, and its weights before and after them."""
    learner = Learner(config(folder, "full", dtype=dtype, optimizer=SMALL))
    before = gather({n: p.clone() for n, p in trained_parameters(learner.model).items()})
    for seed in range(steps):
        learner.step(make_batch(make_groups(seed=seed)))
    return learner, before, gather(trained_parameters(learner.model))


def test_small_updates_reach_the_masters(folder: Path) -> None:
    _, before32, after32 = trained(folder, "fp32", 5)
    learner, before16, after16 = trained(folder, "bf16", 5)
    for name, after in after16.items():
        assert after.dtype == torch.float32
        if after.dim() > 1:
            moved = (after != before16[name]).float().mean()
            should = (after32[name] != before32[name]).float().mean()
            assert moved > 0.95 * should, name
    update32, update16 = (
        torch.cat([(after[n] - before[n]).flatten() for n in after])
        for before, after in ((before32, after32), (before16, after16))
    )
    assert torch.cosine_similarity(update32, update16, dim=0) > 0.9
    state = next(iter(learner._optimizer.state.values()))
    assert state["exp_avg"].dtype == torch.float32


def test_a_snapshot_is_what_the_forward_pass_computes_with(folder: Path) -> None:
    learner, _, after = trained(folder, "bf16", 2)
    sent = views(learner.snapshot())
    assert sent.keys() == {learner.model.names.parameter_to_hf(n) for n in after}
    for name, weight in after.items():
        assert torch.equal(sent[learner.model.names.parameter_to_hf(name)], weight.bfloat16())
