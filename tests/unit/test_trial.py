"""The proof with a random adapter at the start of a run whose model no test knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from canaries import PROBES
from fake_runs import FakeLearner, FakeRollouts, make_run
from families import make_family
from learners import config

from learner.learner import Learner
from tora.adapters.inject import row_norm_caches
from tora.config.schema import ALL_LINEAR, SyncConfig
from tora.errors import SyncError
from tora.launch.engines import make_torch_engine
from tora.run.canary import Canary
from tora.types import LogprobRequest, Metrics, PolicySnapshot


def state(learner: Learner) -> dict[str, torch.Tensor]:
    tensors = {**dict(learner.model.named_parameters()), **dict(learner.model.named_buffers())}
    return {n: t.detach().clone() for n, t in tensors.items() if "lora_" in n or n in row_norm_caches(learner.model)}


class OneEngine(FakeRollouts):
    """The torch engine with its own copy of the model, which may forget adapters."""

    def __init__(self, engine: Any, *, forgets: bool) -> None:
        super().__init__()
        self.engine, self.forgets = engine, forgets

    def publish(self, snapshot: PolicySnapshot, *, generates: bool = True) -> Metrics:
        self.engine.install(snapshot)
        self.events.append(f"{snapshot.version} {generates}")
        return {}

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        return {0: self.engine.logprobs(requests, adapter=adapter and not self.forgets)}


@pytest.mark.parametrize("forgets", [False, True])
def test_an_engine_that_forgets_a_new_adapter_is_found_before_the_first_sync(tmp_path: Path, forgets: bool) -> None:
    """Its B is 0, so that the first policy is the base's whatever the engine does with it."""
    folder = make_family(tmp_path / "base", "mistral")
    cfg = config(folder, "dora_cache", model={"lora_targets": ALL_LINEAR}, sync=SyncConfig(canary_every=1))
    learner = Learner(cfg)
    before = state(learner)
    rollouts = OneEngine(make_torch_engine(cfg), forgets=forgets)
    run = make_run(tmp_path, [FakeLearner()])
    run = replace(run, learner=learner, rollouts=rollouts, canary=Canary.from_config(cfg, PROBES), tries_adapter=True)
    if forgets:
        with pytest.raises(SyncError, match="does not serve policy with a random adapter"):
            run.try_out()
    else:
        run.try_out()
        run.try_out()  # nothing more to prove
        assert rollouts.events == ["0 False"]
    after = state(learner)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    run.publish(0)  # passes either way: what is tried is what it cannot see


def test_the_noise_is_added_once(tmp_path: Path) -> None:
    learner = Learner(config(make_family(tmp_path, "mistral"), "lora"))
    before = learner.snapshot()
    learner.try_out(True)
    once = learner.snapshot()
    learner.try_out(True)
    assert learner.snapshot().sha256 == once.sha256 != before.sha256
    learner.try_out(False)
    learner.try_out(False)
    assert learner.snapshot().sha256 == before.sha256
