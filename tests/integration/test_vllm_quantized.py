"""vLLM on the dequantized weights of an NF4 base, and on the original checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import TYPES, build, model_config, shake
from decoders import CPU, packed_logits
from tiny import make_text_model
from vllm_engines import PROMPT, start_engine
from vllm_engines import request as sample_request

from tora.adapters.inject import snapshot
from tora.models.dequantized import dequantized_folder, in_use

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("served") / "base", "qwen2")


@pytest.fixture(scope="module", params=["dequantized", "checkpoint"])
def served(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[tuple[str, Any]]:
    folder, cache, resources = checkpoint, checkpoint.parent / "cache", ExitStack()
    if request.param == "dequantized":
        resources.enter_context(in_use(cache))
        folder = dequantized_folder(checkpoint, cache, dtype=torch.float32, device=CPU)
    engine = start_engine(folder, resources=resources)
    yield request.param, engine
    engine.close()
    assert not cache.exists(), "closing the engine deletes the folder"


@pytest.mark.parametrize("lora_type", ["lora", "dora_cache"])
def test_vllm_serves_the_quantised_policy(served: tuple[str, Any], checkpoint: Path, lora_type: str) -> None:
    base, engine = served
    learner = build(model_config(checkpoint, lora_type, quantize_base=True))
    shake(learner)
    engine.install(snapshot(learner, TYPES.index(lora_type)))
    largest = 0.0
    for completion in engine.generate([sample_request(num_samples=4)])[0]:
        ids = torch.tensor([*PROMPT, *completion.token_ids.tolist()])
        with torch.no_grad():
            logprobs = packed_logits(learner, [ids])[len(PROMPT) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(1, torch.from_numpy(completion.token_ids)[:, None])[:, 0]
        largest = max(largest, float((own - torch.from_numpy(completion.logprobs)).abs().max()))
    assert largest < 1e-3 if base == "dequantized" else largest > 0.1
