"""Two gloo ranks against one: a KL reference that is no longer part of the policy, and dropout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import compare, compare_metrics
from learners import config, make_groups
from ranks import RANKS, RankProcesses
from references import write_adapter
from tiny import make_text_model, make_vl_model
from vision_learners import SGD, batch_of, vision_groups, vl_config

from learner.learner import Learner
from tora.adapters.snapshot import unpack
from tora.config.schema import RunConfig

SMOOTH = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "eps": 1e-4}
LOSS = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.05}


def train_and_save(cfg: RunConfig, batches: list[Any], out: Path) -> None:
    """Three steps, with a policy in between that other passes have gathered."""
    learner = Learner(cfg)
    results = []
    for batch in batches:
        results.append(learner.step(batch).metrics)
        learner.logprobs(batch.micro_batches[0], adapter=True)
    snapshot = learner.snapshot()
    if learner.world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        torch.save({"metrics": results, "snapshot": unpack(snapshot)}, out / "seen.pt")
    learner.save(out)


@pytest.mark.parametrize(
    ("kind", "quantize_base", "changes"),
    [
        ("dora_cache", False, {"fsdp_reshard_after_forward": False}),
        pytest.param("lora", True, {"fsdp_cpu_offload": True}, marks=pytest.mark.slow),
        pytest.param("tower", False, {}, marks=pytest.mark.slow),
        ("tower", False, {"fsdp_reshard_after_forward": False}),
    ],
)
def test_two_ranks_have_one_ranks_reference(
    tmp_path: Path, on_ranks: RankProcesses, kind: str, quantize_base: bool, changes: dict[str, Any]
) -> None:
    if kind == "tower":
        folder = make_vl_model(tmp_path / "model")
        cfg, groups = vl_config(folder, "lora", "full", optimizer=SGD), vision_groups(folder)
        batches = [batch_of(groups, capacity=100, num_ranks=RANKS)] * 3
    else:
        folder = make_text_model(tmp_path / "model")
        cfg = config(folder, kind, quantize_base=quantize_base, optimizer=SMOOTH)
        batches = [batch_of(make_groups(3, seed=i), capacity=90, num_ranks=RANKS) for i in range(3)]
    cfg = dataclasses.replace(cfg, loss=LOSS)
    adapter = write_adapter(cfg, tmp_path / "adapter")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, adapter_path=str(adapter)))
    train_and_save(cfg, batches, tmp_path / "one")
    on_ranks(train_and_save, dataclasses.replace(cfg, learner_ranks=RANKS, **changes), batches, tmp_path / "two")
    one, two = (torch.load(tmp_path / n / "seen.pt") for n in ("one", "two"))
    assert one["metrics"][0]["kl/mean"] == pytest.approx(0, abs=1e-9)
    assert one["metrics"][2]["kl/mean"] > 1e-6
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        compare_metrics(a, b)
    compare(one["snapshot"], two["snapshot"])

    again = [Learner(cfg) for _ in range(2)]
    for learner, name in zip(again, ("one", "two"), strict=True):
        learner.restore(tmp_path / name)
    a, b = (learner.step(batches[0]).metrics for learner in again)
    compare_metrics(a, b)
    assert a["kl/mean"] > 1e-6


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora_cache", marks=pytest.mark.slow)])
def test_two_ranks_drop_what_one_rank_drops(tmp_path: Path, on_ranks: RankProcesses, kind: str) -> None:
    cfg = config(make_text_model(tmp_path / "model"), kind, optimizer=SMOOTH, loss=LOSS, ppo_epochs=2)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, lora_dropout=0.3))
    batches = [batch_of(make_groups(3, seed=i), capacity=90, num_ranks=RANKS) for i in range(3)]
    train_and_save(cfg, batches, tmp_path / "one")
    on_ranks(train_and_save, dataclasses.replace(cfg, learner_ranks=RANKS), batches, tmp_path / "two")
    one, two = (torch.load(tmp_path / n / "seen.pt") for n in ("one", "two"))
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        compare_metrics(a, b)
    compare(one["snapshot"], two["snapshot"])
