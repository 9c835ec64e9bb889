"""What `tora doctor --parity` says of right and wrong adapters, with the torch engine and its own copy of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import config
from tiny import make_text_model
from wrong_adapters import Damage, WrongEngine, rescaled, without_gain, without_one_module

from actors.torch_engine.engine import TorchEngine
from learner.learner import Learner
from learner.policy import build_policy
from tora.commands.parity_row import ParityRow, Reference, compare
from tora.types import Prompt

PROMPTS = [Prompt(i, ids, "", {}) for i, ids in enumerate([(5, 9, 30, 41), (7, 8), tuple(range(3, 60)), (100, 3)])]


class Pair:
    """A DoRA learner and an engine that it does not share its model with."""

    def __init__(self, folder: Path, dtype: str) -> None:
        cfg = config(folder, "dora_cache", dtype=dtype)
        cpu = torch.device("cpu")
        self.learner = Learner(cfg)
        self.engine = TorchEngine(build_policy(cfg, cpu), device=cpu, shared=False, max_rows=100)
        self.rounding, self.version = 0.0, 0

    def compare(self, engine: Any = None) -> tuple[ParityRow, Reference]:
        self.version += 1
        return compare(
            "dora", engine or self.engine, self.learner, PROMPTS, version=self.version, rounding=self.rounding
        )


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = make_text_model(tmp_path_factory.mktemp("model"), "qwen2")
    pair = Pair(folder, request.param)
    if request.param == "bf16":
        _, reference = Pair(folder, "fp32").compare()
        pair.rounding = reference.gap(pair.learner)
        assert 1e-3 < pair.rounding < 0.1
    yield pair


def test_a_right_adapter_holds(pair: Pair) -> None:
    row, _ = pair.compare()
    assert row.holds and row.tokens == len(PROMPTS) * 4 * 32


@pytest.mark.parametrize("damage", [rescaled, without_gain, without_one_module])
def test_a_wrong_adapter_does_not(pair: Pair, damage: Damage) -> None:
    row, _ = pair.compare(WrongEngine(pair.engine, damage))
    assert not row.holds and row.off_mean <= row.off_bound, "the base is right"
    assert min(row.on_mean, row.sampled_mean) > 1.3 * row.on_bound, "by a margin"


NAN = float("nan")
GOOD = {
    "fp32": ParityRow("lora", "fp32", 1e-6, 1e-5, 1e-6, 1e-5, 1e-6, 1e-5, 0.5, 0.0, 512),
    "bf16": ParityRow("lora", "bf16", 0.03, 0.2, 0.03, 0.2, 0.02, 0.2, 0.5, 0.02, 512),
}


@pytest.mark.parametrize("dtype", GOOD)
def test_every_figure_counts(dtype: str) -> None:
    good = GOOD[dtype]
    assert good.holds
    for name in ("sampled_mean", "on_mean", "off_mean", "effect"):
        assert not replace(good, **{name: NAN}).holds
    for name in ("sampled_mean", "on_mean", "off_mean"):
        assert not replace(good, **{name: 0.2 * good.effect}).holds
    assert not replace(good, effect=good.on_mean).holds, "an adapter that does not stand out proves nothing"
