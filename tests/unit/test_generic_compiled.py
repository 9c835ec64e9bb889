"""`compile: true` on families that run transformers' code. Dynamo alone decides what breaks and compiles again, so the
graphs run eagerly; `tests/integration/test_compile.py` has kernels."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
import torch._dynamo
from comparisons import compare_metrics
from families import FAMILIES, make_family
from learners import LOSS, config, make_batch, make_groups
from torch._dynamo.utils import counters
from vision_learners import batch_of, vision_groups, vl_config

from learner.learner import Learner
from tora.bench.vision_families import VISION_FAMILIES, write_vision_family
from tora.config.schema import ALL_LINEAR

FAST = ("olmo2",)
"""The others take half a minute each."""


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_compiled_layers_compute_the_same_and_stay_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    folder = make_family(tmp_path, family)
    changes = {"loss": LOSS, "model": {"lora_targets": ALL_LINEAR}}
    eager, compiled = (Learner(config(folder, "dora_cache", compile=c, **changes)) for c in (False, True))
    for seed, capacity in enumerate((10_000, 20)):
        batch = make_batch(make_groups(3, seed=seed), capacity=capacity)
        compare_metrics(eager.step(batch).metrics, compiled.step(batch).metrics, rel=2e-3)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 16
    for seed, capacity in enumerate((10_000, 45), start=9):
        batch = make_batch(make_groups(3, seed=seed), capacity=capacity)
        eager.step(batch), compiled.step(batch)
    assert counters["stats"]["unique_graphs"] == graphs, "recompiled after warm-up"
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_layers_of_a_model_with_images_are_compiled_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    if family == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("its processor needs the package num2words")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    folder = write_vision_family(tmp_path, family)
    groups = vision_groups(folder)
    eager, compiled = (Learner(vl_config(folder, "dora_cache", "lora", loss=LOSS, compile=c)) for c in (False, True))
    for capacity in (10_000, 200):
        batch = batch_of(groups, capacity=capacity)
        compare_metrics(eager.step(batch).metrics, compiled.step(batch).metrics, rel=2e-3)
