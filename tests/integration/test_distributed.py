"""Two gloo ranks against one: the same losses, updates, snapshots and files up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import compare, compare_in_bf16, compare_metrics, compare_metrics_in_bf16
from learners import SETTINGS as ONE_RANK
from learners import config, in_parts, make_batch, make_groups
from ranks import RANKS, RankProcesses
from safetensors.torch import load_file
from tiny import make_text_model
from torch import nn
from torch.distributed.tensor import DTensor
from torch_engines import engine_of

from learner.fsdp import sharder
from learner.learner import Learner
from learner.policy import empty_policy, fill_policy
from tora.adapters.snapshot import unpack
from tora.batching.batch import micro_batches
from tora.batching.packing import spread
from tora.distributed.process_group import World, join
from tora.types import SampleRequest, Sampling, StepResult, TrainBatch

TYPES = ("full", "lora", "dora", "dora_cache")
LOSS = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.05}
SETTINGS: dict[str, Any] = {**ONE_RANK, "num_ranks": RANKS}
SMOOTH = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "eps": 1e-4}
"""With its default eps, Adam would turn a gradient of pure rounding noise into a whole step."""
SHARE_OF_BF16 = 0.2
"""How far two ranks may be from one, against how far bf16 is from float32: 0.07 at most where that was measured."""
SAME_UPDATES = ("dtype", "loss", "ppo_epochs", "num_mini_batches", "quantize_base", "model")
"""Keys that change what is computed, not only where."""


def batches(num_mini_batches: int = 1) -> list[TrainBatch]:
    """Batches of one, several and an odd number of micro-batches."""
    groups = [make_groups(3, seed=i) for i in range(3)]
    halved = [
        TrainBatch(micro_batches(g, capacity=capacity, num_mini_batches=num_mini_batches, **SETTINGS), 1.0)
        for g, capacity in zip(groups[:2], (10_000, 50), strict=True)
    ]
    return [*halved, make_batch(groups[2], capacity=100, num_mini_batches=num_mini_batches)]


def train_and_save(folder: Path, out: Path, lora_type: str, changes: dict[str, Any]) -> None:
    learner = Learner(config(folder, lora_type, **{"loss": LOSS, "optimizer": SMOOTH, **changes}))
    if learner.cfg.step_parts:
        results = [step_in_parts(learner, seed, capacity) for seed, capacity in enumerate((10_000, 50, 100))]
    else:
        results = [learner.step(batch) for batch in batches(learner.cfg.num_mini_batches)]
    snapshot = learner.snapshot()
    if learner.world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        torch.save({"metrics": [r.metrics for r in results], "snapshot": unpack(snapshot)}, out / "seen.pt")
    learner.save(out)
    learner.export(out / "export")


def step_in_parts(learner: Learner, seed: int, capacity: int) -> StepResult:
    """As a step of `batches`, with parts of 1 and 2 groups."""
    first, last = in_parts(make_groups(3, seed=seed), [1], capacity, num_ranks=RANKS)
    learner.accumulate(first)
    return learner.step(last)


@pytest.mark.parametrize(
    ("lora_type", "changes"),
    [
        *((t, {}) for t in TYPES),
        *((t, {"step_parts": 2}) for t in ("full", "dora_cache")),
        ("full", {"step_parts": 2, "dtype": "bf16", "fsdp_cpu_offload": True}),
        *((t, {"dtype": "bf16"}) for t in TYPES),
        ("full", {"dtype": "bf16", "activation_checkpointing": "full", "fsdp_cpu_offload": True}),
        ("lora", {"ppo_epochs": 2, "fsdp_reshard_after_forward": False}),
        ("dora_cache", {"fsdp_cpu_offload": True}),
        pytest.param("dora_cache", {"compile": True}, marks=pytest.mark.slow),
        ("full", {"activation_checkpointing": "full"}),
        ("dora_cache", {"model": {"implementation": "transformers"}}),
        pytest.param("full", {"model": {"implementation": "transformers"}, "dtype": "bf16"}, marks=pytest.mark.slow),
        ("dora", {"loss": {**LOSS, "kl_in": "reward"}}),
        ("lora", {"loss": {**LOSS, "kl_in": "reward", "entropy_coeff": 0.01}, "num_mini_batches": 2, "ppo_epochs": 2}),
        ("lora", {"quantize_base": True}),
        ("dora_cache", {"quantize_base": True}),
    ],
)
def test_two_ranks_train_like_one(
    tmp_path: Path, on_ranks: RankProcesses, lora_type: str, changes: dict[str, Any]
) -> None:
    folder = make_text_model(tmp_path / "model", "qwen2")
    in_bf16 = lora_type == "full" and changes.get("dtype") == "bf16"  # with rounding in every layer of the gradient
    same = {*SAME_UPDATES, "step_parts"} if in_bf16 else SAME_UPDATES  # other micro-batches are rounded differently
    alone = {key: value for key, value in changes.items() if key in same}
    train_and_save(folder, tmp_path / "one", lora_type, alone)
    on_ranks(train_and_save, folder, tmp_path / "two", lora_type, {**changes, "learner_ranks": RANKS})
    one, two = (torch.load(tmp_path / n / "seen.pt") for n in ("one", "two"))
    exported = "model" if lora_type == "full" else "adapter_model"
    files = ("weights.safetensors", f"export/{exported}.safetensors", "optimizer.safetensors")
    if in_bf16:
        check_in_bf16(folder, tmp_path, alone, files)
    else:
        for a, b in zip(one["metrics"], two["metrics"], strict=True):
            compare_metrics(a, b)
        compare(one["snapshot"], two["snapshot"])
        for file in files:
            atol = 1e-4 if file.startswith("optimizer") else 2e-5
            compare(*(load_file(tmp_path / n / file) for n in ("one", "two")), atol=atol)

    resumed = Learner(config(folder, lora_type, **{"loss": LOSS, "optimizer": SMOOTH, **alone}))
    resumed.restore(tmp_path / "two")  # written by two ranks, read by one
    compare(unpack(resumed.snapshot()), two["snapshot"], atol=1e-6)


def check_in_bf16(folder: Path, out: Path, changes: dict[str, Any], files: Sequence[str]) -> None:
    """One rank and two are no further from each other than a part of what bf16 costs either."""
    train_and_save(folder, out / "exact", "full", {**changes, "dtype": "fp32"})
    names = ("one", "two", "exact")
    one, two, exact = (torch.load(out / name / "seen.pt") for name in names)
    for metrics in zip(one["metrics"], two["metrics"], exact["metrics"], strict=True):
        compare_metrics_in_bf16(*metrics)
    compare_in_bf16(one["snapshot"], two["snapshot"], exact["snapshot"], SHARE_OF_BF16)
    for file in files:
        compare_in_bf16(*(load_file(out / name / file) for name in names), SHARE_OF_BF16)


def watch_loading(folder: Path) -> None:
    cfg, cpu, world = config(folder, "dora_cache", learner_ranks=RANKS), torch.device("cpu"), World.from_environment()
    join(world, cpu)
    model = empty_policy(cfg, cpu)
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
    shard = sharder(world, cpu, compute=torch.float32, reshard_after_forward=True, cpu_offload=False)
    whole = []

    def watched(unit: nn.Module) -> None:
        whole.append(sum(p.numel() for p in model.parameters() if not (p.is_meta or isinstance(p, DTensor))))
        shard(unit)

    fill_policy(model, cfg, cpu, watched)
    assert max(whole[:-1]) == largest and len(whole) == len(model.layers) + 1
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_loading_holds_at_most_one_whole_layer_per_rank(tmp_path: Path, on_ranks: RankProcesses) -> None:
    on_ranks(watch_loading, make_text_model(tmp_path / "model"))


def load_and_step(folder: Path, checkpoint: Path, out: Path) -> None:
    learner = Learner(config(folder, "dora_cache", loss=LOSS))
    learner.restore(checkpoint)
    learner.step(batches()[1])
    snapshot = learner.snapshot()
    if learner.world.rank == 0:
        torch.save(unpack(snapshot), out)


def test_two_ranks_resume_from_one_ranks_checkpoint(tmp_path: Path, on_ranks: RankProcesses) -> None:
    folder = make_text_model(tmp_path / "model")
    (tmp_path / "checkpoint").mkdir()
    learner = Learner(config(folder, "dora_cache", loss=LOSS))
    learner.step(batches()[0])
    learner.save(tmp_path / "checkpoint")
    load_and_step(folder, tmp_path / "checkpoint", tmp_path / "one.pt")
    on_ranks(load_and_step, folder, tmp_path / "checkpoint", tmp_path / "two.pt")
    compare(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt"))


def generate_apart(folder: Path, out: Path) -> None:
    """The ranks have different numbers of prompts; neither may wait for the other."""
    learner = Learner(config(folder, "dora"))
    learner.step(batches()[0])
    engine = engine_of(learner)
    count = 1 + 2 * learner.world.rank
    requests = [SampleRequest((5, 6, 7 + i), 2, i, Sampling(6 + 5 * learner.world.rank)) for i in range(count)]
    tokens = [c.token_ids.tolist() for group in engine.generate(requests) for c in group]
    torch.save((requests, tokens), f"{out}.{learner.world.rank}")
    learner.step(batches()[1])


def test_ranks_generate_their_own_share(tmp_path: Path, on_ranks: RankProcesses) -> None:
    folder = make_text_model(tmp_path / "model")
    on_ranks(generate_apart, folder, tmp_path / "seen")
    alone = Learner(config(folder, "dora"))
    alone.step(batches()[0])
    engine = engine_of(alone)
    for rank in range(RANKS):
        requests, tokens = torch.load(f"{tmp_path / 'seen'}.{rank}", weights_only=False)
        assert tokens == [c.token_ids.tolist() for group in engine.generate(requests) for c in group]


def test_bins_are_split_until_every_rank_has_the_same_number() -> None:
    lengths = [9, 1, 5, 5, 7]
    assert spread([[0, 1, 2, 3, 4]], lengths, 1) == [[0, 1, 2, 3, 4]]
    halves = spread([[0, 1, 2, 3, 4]], lengths, 2)
    assert sorted(i for half in halves for i in half) == [0, 1, 2, 3, 4]
    assert {sum(lengths[i] for i in half) for half in halves} == {14, 13}
    assert len(spread([[0]], lengths, 2)) == 1, "a sequence is never split"
