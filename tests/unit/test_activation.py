"""Activation checkpointing: the same training with recomputed activations and less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from comparisons import compare, compare_metrics
from learners import config, make_batch, make_groups, train
from tiny import make_text_model
from torch._dynamo.utils import counters

from learner.learner import Learner
from tora.errors import ConfigError

NUM_LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), "qwen2", num_layers=NUM_LAYERS)


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("lora_type", ["full", "lora", "dora", "dora_cache"])
def test_checkpointing_changes_no_bit(folder: Path, lora_type: str, kind: str) -> None:
    plain, checkpointed = train(folder, lora_type), train(folder, lora_type, activation_checkpointing=kind)
    assert plain[0] == checkpointed[0]
    assert all(torch.equal(tensor, checkpointed[1][name]) for name, tensor in plain[1].items())


@pytest.mark.parametrize("lora_type", [pytest.param("lora", marks=pytest.mark.slow), "dora_cache"])
def test_checkpointing_with_compiled_layers(folder: Path, lora_type: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    plain = train(folder, lora_type)
    both = train(folder, lora_type, activation_checkpointing="full", compile=True)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for a, b in zip(plain[0], both[0], strict=True):
        compare_metrics(a, b, rel=2e-3)
    compare(plain[1], both[1])


@pytest.mark.parametrize(("kind", "forwards"), [("none", [1, 1, 1]), ("full", [2, 2, 2]), ("selective", [2, 1, 2])])
def test_checkpointed_layers_are_recomputed_in_the_backward_pass(folder: Path, kind: str, forwards: list[int]) -> None:
    learner = Learner(config(folder, activation_checkpointing=kind))
    calls = [0] * NUM_LAYERS

    def count(layer: int) -> Any:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    for index, layer in enumerate(learner.model.layers):
        layer.attn.register_forward_pre_hook(count(index))
    learner.step(make_batch(make_groups()))
    assert calls == forwards


@pytest.mark.parametrize(("kind", "share"), [("full", 0.2), ("selective", 0.8)])
def test_checkpointing_keeps_less_for_the_backward_pass(folder: Path, kind: str, share: float) -> None:
    def kept(kind: str) -> int:
        learner, sizes = Learner(config(folder, activation_checkpointing=kind)), {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in learner.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            learner.step(make_batch(make_groups()))
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    assert kept(kind) < share * kept("none")


def test_offloading_is_refused_on_a_cpu(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"activation_offloading=true .* runs on a CPU\."):
        Learner(config(folder, activation_checkpointing="full", activation_offloading=True, device="cpu"))
