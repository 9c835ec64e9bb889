"""The plan's arithmetic against models: weights on the meta device, and the bytes that autograd really saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.learner import Learner
from learner.logprobs import CHUNK_BYTES
from learner.policy import empty_policy
from tora.bench.learner import Workload, make_batch, make_config, make_prompt
from tora.bench.rows import Setting
from tora.bench.shapes import write_random_model
from tora.config.schema import RunConfig
from tora.models.load import build_model, read_config
from tora.models.quantize import NF4Tensor  # pyright: ignore[reportAttributeAccessIssue]
from tora.models.released import shape_config, shape_names
from tora.plan import activations as plan
from tora.plan.activations import MicroBatch, activations
from tora.plan.shapes import read_shapes
from tora.plan.training import Training, training_of
from tora.types import TrainBatch

IMAGE = 64
PATCHES = (IMAGE // 16) ** 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = {"tiny fp32": "float32", "tiny bf16": "bfloat16", "tiny_vl fp32": "float32"}
    return {
        name: write_random_model(name.split()[0], root / name.replace(" ", "_"), dtype=dtype)
        for name, dtype in names.items()
    }


def config(folder: Path, name: str, **changes: Any) -> RunConfig:
    """`name`: a model and a dtype; `changes` of the model's config."""
    lora_type = changes.pop("lora_type", "lora")
    quantized = changes.pop("quantize_base", False)
    cfg = make_config(
        folder, Setting(lora_type, quantized), dtype="fp32" if "fp32" in name else "bf16", rank=8, tokens=512
    )
    return replace(cfg, model=replace(cfg.model, **changes))


def saved_bytes(learner: Learner, batch: TrainBatch) -> int:
    """Of the distinct tensors that autograd keeps in a forward pass, without weights."""
    (x,) = learner._to_inputs(batch.micro_batches, batch.micro_batches)
    held = [*learner.model.parameters(), *learner.model.buffers()]
    weights = {t.untyped_storage().data_ptr() for t in held if not isinstance(t.data, NF4Tensor)}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, NF4Tensor) and (storage := t.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), t  # the tensor too, so that its address is not used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logprobs = learner._logprobs(learner.model, x, 1.0)
    assert logprobs[0].requires_grad
    return sum(size for size, _ in kept.values())


CASES: list[tuple[str, dict[str, Any]]] = [
    *((f"tiny {dtype}", {"lora_type": kind}) for dtype in ("fp32", "bf16") for kind in ("lora", "dora", "dora_cache")),
    ("tiny fp32", {"lora_type": "full"}),
    ("tiny bf16", {"quantize_base": True}),
    ("tiny bf16", {"lora_targets": ["q_proj", "v_proj"]}),
    ("tiny bf16", {"lora_targets": ["down_proj"]}),
    ("tiny fp32", {"lora_targets": r".*layers\.1\..*_proj"}),
    ("tiny bf16", {"lora_dropout": 0.1}),
    ("tiny fp32", {"lora_type": "dora", "lora_dropout": 0.1}),
    ("tiny_vl fp32", {}),
    ("tiny_vl fp32", {"train_vision": "lora"}),
    ("tiny_vl fp32", {"train_vision": "full"}),
    ("tiny_vl fp32", {"lora_type": "full", "train_vision": "full"}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=[f"{n} {' '.join(map(str, c.values()))}" for n, c in CASES])
def test_activations_are_what_autograd_saves(folders: dict[str, Path], name: str, changes: dict[str, Any]) -> None:
    """Within 1 %: A, B and gains that are cast or scaled, and indices, are not counted."""
    folder, image = folders[name], IMAGE if "vl" in name else 0
    cfg = config(folder, name, **changes)
    learner = Learner(cfg)
    vocab, workload = learner.model.embedding.shape[0], Workload(tokens=1024, sequence=128, image=image)
    batch = make_batch(workload, make_prompt(workload, folder, vocab), vocab)
    learner.model.train(cfg.model.lora_dropout > 0)
    training = training_of(cfg, read_shapes(read_config(folder)))
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    assert training.adapter_weights + training.master_weights == sum(p.numel() for p in trained)
    packed = batch.micro_batches[0]
    size = MicroBatch(
        len(packed.tokens_T), len(packed.response_N), PATCHES if image else 0, longest=workload.sequence, on_gpu=False
    )
    assert activations(training, size).saved.total() == pytest.approx(saved_bytes(learner, batch), rel=0.01)


@pytest.mark.parametrize("name", ["tiny_vl", "qwen3/0.6B", "qwen3/8B", "qwen2_5/7B", "llama3_1/8B", "qwen3_vl/8B"])
def test_weights_are_those_of_the_model(name: str) -> None:
    shapes_config = shape_config(name)
    with torch.device("meta"):
        model = build_model(shapes_config)
    shapes = read_shapes(shapes_config)
    assert shapes.weights == sum(p.numel() for p in model.parameters())
    norms = [p for n, p in model.named_parameters() if n.endswith("scale")]
    assert shapes.norm_weights == sum(p.numel() for p in norms)


def test_every_shape_is_read() -> None:
    for name in shape_names():
        assert read_shapes(shape_config(name)).weights > 1e6


@pytest.mark.parametrize("kind", ["lora", "dora_cache"])
def test_adapters_are_those_of_the_policy(folders: dict[str, Path], kind: str) -> None:
    cfg = config(folders["tiny bf16"], "tiny bf16", lora_type=kind, quantize_base=True)
    model = empty_policy(cfg, torch.device("cpu"))
    training = training_of(cfg, read_shapes(read_config(folders["tiny bf16"])))
    assert training.gradient_bytes == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for n, b in model.named_buffers() if n.endswith("norm"))
    assert training.adapter_bytes == training.gradient_bytes + buffers


def big(**changes: Any) -> tuple[Training, MicroBatch]:
    cfg = make_config(Path("unused"), Setting("lora"), dtype="bf16", rank=8, tokens=8192)
    training = training_of(replace(cfg, **changes), read_shapes(shape_config("qwen3/8B")))
    return training, MicroBatch(8192, 8192, 0, longest=1024, on_gpu=True)


def test_an_8b_keeps_what_was_measured_before() -> None:
    """About 193 KB a token and layer for LoRA, as counted by hand."""
    training, batch = big()
    assert activations(training, batch).saved.total() / 8192 / 36 == pytest.approx(190_000, rel=0.03)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    training, batch = big()
    none, some, full = (
        activations(training, replace(batch, checkpointing=kind)) for kind in ("none", "selective", "full")
    )
    assert full.saved["layer inputs"] == 36 * 8192 * 4096 * 2
    assert full.peak < some.peak < none.peak
    assert full.peak < 0.1 * none.peak
    offloaded = activations(training, replace(batch, checkpointing="full", offloading=True))
    assert offloaded.saved["layer inputs"] == 2 * 8192 * 4096 * 2


def test_the_chunk_is_the_learners() -> None:
    assert plan.CHUNK_BYTES == CHUNK_BYTES
