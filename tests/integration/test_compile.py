"""Compiled training and decoding: the same numbers as eager, no graph breaks, no recompilation after warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from comparisons import compare_metrics
from learners import LOSS, config, make_batch, make_groups, weights
from tiny import make_text_model
from torch._dynamo.utils import counters
from torch_engines import engine_of

from learner.learner import Learner
from tora.distributed.sharding import full_tensor
from tora.types import SampleRequest, Sampling


def generate(learner: Learner, *prompts: tuple[int, ...]) -> list[list[int]]:
    """The tokens of three rollouts per prompt."""
    groups = engine_of(learner).generate([SampleRequest(prompt, 3, 0, Sampling(12)) for prompt in prompts])
    return [completion.token_ids.tolist() for group in groups for completion in group]


@pytest.mark.parametrize(
    ("lora_type", "changes"),
    [
        pytest.param("full", {}, marks=pytest.mark.slow),
        pytest.param("lora", {}, marks=pytest.mark.slow),
        pytest.param("dora", {}, marks=pytest.mark.slow),
        ("dora_cache", {}),
        pytest.param("dora_cache", {"model": {"implementation": "transformers"}}, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_equals_eager_and_stays_compiled(
    tmp_path: Path, lora_type: str, changes: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    counters.clear()
    folder = make_text_model(tmp_path, "qwen2")
    eager, compiled = (Learner(config(folder, lora_type, loss=LOSS, compile=c, **changes)) for c in (False, True))
    # one document and several, long and short; then unseen lengths
    warm = [make_batch(make_groups(3, seed=i), capacity=c) for i, c in enumerate((10_000, 20))]
    fresh = [make_batch(make_groups(2 + i, seed=9 + i), capacity=c) for i, c in enumerate((10_000, 45, 25))]
    for batch in warm:
        compare_metrics(eager.step(batch).metrics, compiled.step(batch).metrics, rel=2e-3)
    decoded = [generate(learner, (5, 6, 7), (8, 9)) for learner in (eager, compiled)]
    assert decoded[0] == decoded[1]
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 16
    generate(compiled, (8, 9), (1, 2, 3), tuple(range(1, 133)))  # more rows, and a cache that grows
    for batch in fresh:
        a, b = eager.step(batch), compiled.step(batch)
        assert a.metrics["loss/total"] == pytest.approx(b.metrics["loss/total"], rel=2e-3, abs=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs, "recompiled after warm-up"
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("lora_type", ["full", "lora", "dora_cache"])
def test_compiled_gradients_in_bf16_are_as_exact_as_eager_ones(tmp_path: Path, lora_type: str) -> None:
    """Against float32, after a step of plain SGD, which changes the weights by the gradient."""
    torch._dynamo.reset()
    folder = make_text_model(tmp_path, "qwen2")
    sgd = {"_component_": "torch.optim.SGD", "lr": 1.0}

    def gradient(**changes: Any) -> torch.Tensor:
        learner = Learner(config(folder, lora_type, loss=LOSS, optimizer=sgd, clip_grad_norm=None, **changes))
        before = weights(learner)
        learner.step(make_batch(make_groups(3, seed=0)))
        return torch.cat(
            [full_tensor(before[name] - weight).flatten() for name, weight in weights(learner).items()]
        ).double()

    exact = gradient()
    eager, compiled = (float((gradient(dtype="bf16", compile=c) - exact).norm() / exact.norm()) for c in (False, True))
    assert 0 < compiled < 1.5 * eager
