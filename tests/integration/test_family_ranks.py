"""Families that run transformers' code on two gloo ranks against one: updates, and the trial with random B."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import compare, compare_metrics
from families import FAMILIES, make_family
from learners import config, make_groups
from ranks import RANKS, RankProcesses
from vision_learners import SGD, batch_of, vision_groups, vl_config

from learner.learner import Learner
from tora.adapters.snapshot import unpack
from tora.bench.vision_families import VISION_FAMILIES, write_vision_family
from tora.config.schema import ALL_LINEAR, RunConfig

LOSS = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.05}
METHODS: dict[str, tuple[str, bool]] = {
    "LoRA": ("lora", False),
    "DoRA": ("dora_cache", False),
    "NF4": ("dora_cache", True),
    "full": ("full", False),
}

WITHOUT_EXPERTS = ("NF4", "full")


def train_and_save(cfg: RunConfig, batches: list[Any], out: Path) -> None:
    """Two steps, and log-probs with a random B before them."""
    learner = Learner(cfg)
    has_adapter = cfg.model.lora_type != "full"
    before = learner.logprobs(batches[0].micro_batches[0], adapter=True)
    if has_adapter:
        learner.try_out(True)
    tried = learner.logprobs(batches[0].micro_batches[0], adapter=True)
    if has_adapter:
        learner.try_out(False)
    metrics = [learner.step(batch).metrics for batch in batches]
    snapshot = learner.snapshot()
    if learner.world.rank == 0:
        out.mkdir(parents=True)
        seen = {"metrics": metrics, "snapshot": unpack(snapshot), "before": before, "tried": tried}
        torch.save(seen, out / "seen.pt")


def check(cfg: RunConfig, batches: list[Any], on_ranks: RankProcesses, out: Path) -> None:
    train_and_save(cfg, batches, out / "one")
    on_ranks(train_and_save, dataclasses.replace(cfg, learner_ranks=RANKS), batches, out / "two")
    one, two = (torch.load(out / name / "seen.pt", weights_only=False) for name in ("one", "two"))
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        compare_metrics(a, b)
    compare(one["snapshot"], two["snapshot"])
    for name in ("before", "tried"):
        assert abs(one[name] - two[name]).max() < 1e-4
    moved = abs(one["tried"] - one["before"]).max()
    assert (moved > 1e-3) == (cfg.model.lora_type != "full")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family in FAMILIES
        for method in METHODS
        if not ("moe" in family and method in WITHOUT_EXPERTS)
    ],
)
def test_two_ranks_train_what_one_trains(tmp_path: Path, on_ranks: RankProcesses, family: str, method: str) -> None:
    lora_type, quantized = METHODS[method]
    cfg = config(
        make_family(tmp_path / "base", family),
        lora_type,
        quantize_base=quantized,
        optimizer=SGD,
        loss=LOSS,
        model={"lora_targets": ALL_LINEAR},
    )
    check(cfg, [batch_of(make_groups(3, seed=i), capacity=90, num_ranks=RANKS) for i in range(2)], on_ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("lora_type", "train_vision"), [("dora_cache", "lora"), ("lora", "full"), ("full", "full")])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_two_ranks_train_what_one_trains_with_images(
    tmp_path: Path, on_ranks: RankProcesses, family: str, lora_type: str, train_vision: str
) -> None:
    """A micro-batch without images runs the tower on a blank one."""
    if family == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("its processor needs the package num2words")
    folder = write_vision_family(tmp_path / "base", family)
    cfg = vl_config(folder, lora_type, train_vision, optimizer=SGD, loss=LOSS)
    check(cfg, [batch_of(vision_groups(folder), capacity=200, num_ranks=RANKS)] * 2, on_ranks, tmp_path)
