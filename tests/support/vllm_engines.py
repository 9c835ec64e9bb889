"""A small vLLM engine, and requests to it."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_reference import RANK
from stepped import StepGate
from tiny import LINEARS

from actors.vllm_engine.config import EngineConfig
from actors.vllm_engine.engine import VLLMEngine
from actors.vllm_engine.weight_updates import BetweenRollouts, WeightUpdate
from tora.types import SampleRequest, Sampling

PROMPT = tuple(range(20, 32))
LONG_PROMPT = tuple((7 * i) % 250 + 3 for i in range(100))
"""More than three KV blocks, so that a second request for it hits the prefix cache."""


def request(
    prompt: tuple[int, ...] = PROMPT, *, num_samples: int = 2, seed: int = 1, max_tokens: int = 12, **kw: Any
) -> SampleRequest:
    return SampleRequest(prompt, num_samples, seed, Sampling(max_tokens, **kw))


def start_engine(
    folder: Path,
    *,
    update: WeightUpdate | None = None,
    resources: ExitStack | None = None,
    gate: StepGate | None = None,
    **options: Any,
) -> VLLMEngine:
    """An engine with two slots unless `update` says otherwise. `options` are fields of `EngineConfig`."""
    small = EngineConfig(
        model_path=str(folder),
        dtype="fp32",
        max_model_len=256,
        lora_rank=RANK,
        lora_targets=LINEARS,
        seed=0,
        gpu_memory_utilization=0.1,
        kv_cache_gib=0.02,
        enforce_eager=True,
    )
    config = replace(small, **options)
    return VLLMEngine(config, update=update or BetweenRollouts(2), resources=resources, step=gate or StepGate())


def wait_until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("timed out")
