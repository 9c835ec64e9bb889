"""The vision learner on two ranks, compiled and checkpointed: the same numbers as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from comparisons import compare, compare_metrics
from learners import LOSS
from ranks import RANKS, RankProcesses
from tiny import make_vl_model
from torch._dynamo.utils import counters
from torch_engines import engine_of
from vision_learners import SGD, batch_of, vision_groups, vl_config

from learner.learner import Learner
from tora.adapters.inject import trained_parameters
from tora.adapters.snapshot import unpack
from tora.models.vision.processor import ImageProcessor
from tora.types import SampleRequest, Sampling, TrainBatch

NUM_BLOCKS, NUM_LAYERS = 3, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"), num_layers=NUM_LAYERS)


def batches(folder: Path, num_ranks: int = RANKS) -> list[TrainBatch]:
    """Prompts with and without images on different ranks; text only; an odd number of micro-batches."""
    halves = [[(64, 32)], []], [[], []], [[(32, 64), (96, 64)], [], [(64, 32), (64, 64)]]
    return [
        batch_of(vision_groups(folder, shown, seed), capacity, share_prefix=True, num_ranks=num_ranks)
        for seed, (shown, capacity) in enumerate(zip(halves, (60, 60, 80), strict=True))
    ]


def train_and_save(folder: Path, out: Path, lora_type: str, train_vision: str, changes: dict[str, Any]) -> None:
    learner = Learner(vl_config(folder, lora_type, train_vision, loss=LOSS, optimizer=SGD, **changes))
    results = [learner.step(batch) for batch in batches(folder)]
    snapshot = learner.snapshot()
    if learner.world.rank == 0:
        torch.save({"metrics": [r.metrics for r in results], "snapshot": unpack(snapshot)}, out)
    learner.export(out.with_suffix(".export"))


@pytest.mark.parametrize(
    ("lora_type", "train_vision", "changes"),
    [
        ("lora", "none", {}),
        ("dora_cache", "lora", {"activation_checkpointing": "full"}),
        ("full", "full", {"fsdp_reshard_after_forward": False}),
        pytest.param("dora_cache", "lora", {"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_like_one(
    tmp_path: Path,
    folder: Path,
    on_ranks: RankProcesses,
    lora_type: str,
    train_vision: str,
    changes: dict[str, Any],
) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    first = [bool(m.images) for m in batches(folder)[0].micro_batches]
    assert {True, False} in [set(pair) for pair in zip(first[::RANKS], first[1::RANKS], strict=True)]
    train_and_save(folder, one, lora_type, train_vision, {})
    on_ranks(train_and_save, folder, two, lora_type, train_vision, {**changes, "learner_ranks": RANKS})
    alone, shared = torch.load(one), torch.load(two)
    for a, b in zip(alone["metrics"], shared["metrics"], strict=True):
        compare_metrics(a, b)
    compare(alone["snapshot"], shared["snapshot"])


def generate(learner: Learner, folder: Path, rank: int) -> list[list[int]]:
    """Greedy completions. The prompt of the first rank has an image, that of the second has none."""
    engine = engine_of(learner, processor=lambda: ImageProcessor(folder))
    prompt = vision_groups(folder, [[(64, 32)], []])[rank].prompt
    request = SampleRequest(prompt.token_ids, 1 + rank, 0, Sampling(6 + rank, temperature=0), prompt.images)
    return [c.token_ids.tolist() for c in engine.generate([request])[0]]


def generate_apart(folder: Path, out: Path) -> None:
    learner = Learner(vl_config(folder, "lora", "lora", learner_ranks=RANKS))
    learner.step(batches(folder)[0])
    torch.save(generate(learner, folder, learner.world.rank), f"{out}.{learner.world.rank}")
    learner.step(batches(folder)[0])


def test_ranks_generate_their_own_share(tmp_path: Path, folder: Path, on_ranks: RankProcesses) -> None:
    """Only one rank has an image: neither may wait for the other."""
    on_ranks(generate_apart, folder, tmp_path / "seen")
    alone = Learner(vl_config(folder, "lora", "lora"))
    alone.step(batches(folder)[0])
    for rank in range(RANKS):
        assert torch.load(f"{tmp_path / 'seen'}.{rank}") == generate(alone, folder, rank)


def test_compilation_wraps_blocks_and_layers(folder: Path) -> None:
    model = Learner(vl_config(folder, "lora", "lora", compile=True)).model
    layers = [layer for stack in model.stacks() for layer in stack]
    assert len(layers) == NUM_BLOCKS + NUM_LAYERS
    assert all(hasattr(layer.forward, "_torchdynamo_orig_callable") for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize(("lora_type", "train_vision"), [("lora", "none"), ("dora_cache", "lora")])
def test_compiled_training_equals_eager_and_stays_compiled(folder: Path, lora_type: str, train_vision: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = (Learner(vl_config(folder, lora_type, train_vision, loss=LOSS, compile=c)) for c in (False, True))
    shown = [[], [(64, 32)]], [[(32, 64), (96, 64)], []], [[(64, 32), (64, 32)], [(96, 96)]], [[(160, 32)], []]
    warm = [batch_of(vision_groups(folder, images, i), share_prefix=True) for i, images in enumerate(shown)]
    for batch in warm:
        compare_metrics(eager.step(batch).metrics, compiled.step(batch).metrics, rel=2e-3)
    graphs = counters["stats"]["unique_graphs"]
    fresh = [[(64, 96), (64, 64)], []], [[(128, 64)], [(32, 32)], [(96, 64), (64, 32)]]
    for i, images in enumerate(fresh):
        batch = batch_of(vision_groups(folder, images, 9 + i), share_prefix=True)
        a, b = eager.step(batch), compiled.step(batch)
        assert a.metrics["loss/total"] == pytest.approx(b.metrics["loss/total"], rel=2e-3, abs=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs, "recompiled after warm-up"
    assert not counters["graph_break"]


@pytest.mark.parametrize(("kind", "forwards"), [("none", [1, 1, 1]), ("full", [2, 2, 2]), ("selective", [2, 1, 2])])
def test_checkpointed_blocks_and_layers_are_recomputed_in_the_backward_pass(
    folder: Path, kind: str, forwards: list[int]
) -> None:
    learner = Learner(vl_config(folder, "lora", "lora", activation_checkpointing=kind))
    calls = [[0] * NUM_BLOCKS, [0] * NUM_LAYERS]

    def count(stack: int, layer: int) -> Any:
        def hook(*_: Any) -> None:
            calls[stack][layer] += 1

        return hook

    for number, stack in enumerate(learner.model.stacks()):
        for index, layer in enumerate(stack):
            layer.attn.register_forward_pre_hook(count(number, index))
    learner.step(batch_of(vision_groups(folder)))
    assert calls == [forwards, forwards]


def test_checkpointing_changes_no_bit(folder: Path) -> None:
    learners = [Learner(vl_config(folder, "dora", "full", activation_checkpointing=kind)) for kind in ("none", "full")]
    for batch in batches(folder, num_ranks=1):
        a, b = (learner.step(batch).metrics for learner in learners)
        assert a == b
    plain, again = (trained_parameters(learner.model) for learner in learners)
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
