"""vLLM in bf16 with images against PEFT in float32, judged by what bf16 alone costs transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_vl_model, picture

pytest.importorskip("vllm")

from peft_reference import VisionReference
from transformers import AutoModelForImageTextToText
from vllm_engines import start_engine

from actors.vllm_engine.engine import VLLMEngine
from tora.types import LogprobRequest

COMPLETION = tuple((11 * i) % 250 + 3 for i in range(90))
IMAGES = (picture(160, 96, seed=1), picture(64, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def reference(folder: Path) -> VisionReference:
    return VisionReference(folder, tower=True)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMEngine]:
    engine = start_engine(folder, dtype="bf16", lm_head_fp32=True, adapt_vision=True)
    yield engine
    engine.close()


def prompt(reference: VisionReference) -> tuple[int, ...]:
    content = [*({"type": "image"} for _ in IMAGES), {"type": "text", "text": "what do you see?"}]
    return tuple(reference.processor.encode([{"role": "user", "content": content}], IMAGES))


def score(engine: VLLMEngine, reference: VisionReference, *, adapter: bool = True) -> np.ndarray:
    (logprobs_N,) = engine.logprobs([LogprobRequest(prompt(reference), COMPLETION, IMAGES)], adapter=adapter)
    return logprobs_N


@torch.no_grad()
def exact(reference: VisionReference, model: Any) -> np.ndarray:
    start = prompt(reference)
    logits = reference.logits(model, [*start, *COMPLETION], IMAGES)[len(start) - 1 : -1].float()
    return logits.log_softmax(1).gather(1, torch.tensor(COMPLETION)[:, None])[:, 0].numpy()


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_as_exact_as_bf16_lets_it_be(
    folder: Path, reference: VisionReference, engine: VLLMEngine, kind: str
) -> None:
    base, adapted = (exact(reference, reference.model(*of)) for of in (("base",), (kind, 1)))
    alone = gap(exact(reference, AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)), base)
    engine.install(reference.snapshot(1, kind, 1))
    assert 0 < gap(score(engine, reference, adapter=False), base) < 1.5 * alone
    assert gap(adapted, base) > 10 * alone
    assert gap(score(engine, reference), adapted) < 2 * alone
