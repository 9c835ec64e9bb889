"""vLLM in bf16 against PEFT in float32, judged by what bf16 alone costs transformers. All tests share one engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_text_model

pytest.importorskip("vllm")

from peft_reference import Reference
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm_engines import LONG_PROMPT, start_engine

from actors.vllm_engine.engine import VLLMEngine
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, pack
from tora.types import LogprobRequest

COMPLETION = tuple((11 * i) % 250 + 3 for i in range(120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), "qwen2", dtype=torch.bfloat16)  # with biases


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMEngine]:
    engine = start_engine(folder, dtype="bf16", lm_head_fp32=True)
    yield engine
    engine.close()


def score(engine: VLLMEngine, completion: tuple[int, ...] = COMPLETION, *, adapter: bool = True) -> np.ndarray:
    (logprobs_N,) = engine.logprobs([LogprobRequest(LONG_PROMPT, completion)], adapter=adapter)
    return logprobs_N


@torch.no_grad()
def exact(model: Any) -> np.ndarray:
    ids = torch.tensor([[*LONG_PROMPT, *COMPLETION]])
    logits = model(input_ids=ids).logits[0, len(LONG_PROMPT) - 1 : -1].float()
    return logits.log_softmax(1).gather(1, torch.tensor(COMPLETION)[:, None])[:, 0].numpy()


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_as_exact_as_bf16_lets_it_be(folder: Path, engine: VLLMEngine, kind: str) -> None:
    reference = Reference(folder)
    base, adapted = exact(reference.model("base")), exact(reference.model(kind, 1))
    alone = gap(exact(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()), base)
    engine.install(reference.snapshot(1, kind, 1))
    assert 0 < gap(score(engine, adapter=False), base) < 1.5 * alone
    assert gap(adapted, base) > 10 * alone
    assert gap(score(engine), adapted) < 3 * alone


def test_logits_are_not_rounded(folder: Path, engine: VLLMEngine) -> None:
    """Differences of two log-probs after the same tokens are those of two logits, which bf16 puts on a grid of 2^-10
    unless one of them is below 0.25."""
    engine.install(Reference(folder).snapshot(2, "lora", 1))
    requests = [LogprobRequest(LONG_PROMPT, (token,)) for token in range(3, 67)]
    logprobs = np.concatenate(engine.logprobs(requests, adapter=True)).astype(np.float64)
    steps = np.diff(logprobs) * 1024
    assert (np.abs(steps - np.round(steps)) > 0.02).mean() > 0.8


def test_a_gain_acts_as_what_it_is(folder: Path, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last layer, by row, as the learner's layer in `tests/unit/test_dora_gain.py`."""
    from actors.vllm_engine.dora_layers import GainLayer

    name, num_in, num_out = "model.layers.1.mlp.down_proj", 256, 128
    gains = torch.tensor([1.0005, 1.001, 1.002, 1.003, 1.005, 1.01, 1.02, 0.97]).repeat(num_out // 8)
    generator = torch.Generator().manual_seed(0)
    lora_a = (torch.randn(4, num_in, generator=generator) / num_in**0.5).bfloat16().float()
    lora_b = (0.1 * torch.randn(num_out, 4, generator=generator)).bfloat16().float()
    engine.install(pack(3, {name + LORA_A: lora_a, name + LORA_B: lora_b, name + GAIN: gains}))

    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    apply = GainLayer.apply

    def recorded_apply(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = apply(self, x, bias)
        if x.shape[-1] == num_in:
            inputs.append(x.clone())
            outputs.append(y.clone())
        return y

    monkeypatch.setattr(GainLayer, "apply", recorded_apply)
    score(engine)
    x, y = inputs[-1].double(), outputs[-1]
    assert y.dtype == torch.bfloat16
    weight = load_file(folder / "model.safetensors")[f"{name}.weight"].double()
    unit = x @ (weight + lora_b.double() @ lora_a.double()).T
    acts_as_O = (y.double() * unit).sum(0) / unit.square().sum(0)
    by_gain = acts_as_O.view(-1, 8).mean(0)
    assert ((by_gain - gains[:8]).abs() < 2e-4 + 0.02 * (gains[:8] - 1).abs()).all()
    ours = y.double() - unit * gains
    once = (unit * gains).bfloat16().double() - unit * gains
    assert ours.square().mean().sqrt() < 1.5 * once.square().mean().sqrt()
