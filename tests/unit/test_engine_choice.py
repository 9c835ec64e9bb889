"""Which engine `rollout.engine: auto` stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from learners import config

from tora.config.schema import RunConfig
from tora.errors import ConfigError
from tora.launch.engines import resolved_engine


def run_config(*, rollout: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    cfg = config(Path("a/model"), **keys)
    return replace(
        cfg,
        rewards=[{"_component_": "tora.rewards.last_number"}],
        rollout=replace(cfg.rollout, **{"engine": "auto", **(rollout or {})}),
        model=replace(cfg.model, **model or {}),
    )


SYNC: dict[str, Any] = {"async_rl": False, "max_generated_tokens": 64}
ASYNC: dict[str, Any] = {"async_rl": True, "max_generated_tokens": 64}


@pytest.mark.parametrize(
    ("cfg", "on_gpu", "engine"),
    [
        (run_config(**SYNC), False, "torch"),
        (run_config(**SYNC), True, "vllm"),
        (run_config(async_rl=False, max_generated_tokens=65), False, "vllm"),
        (run_config(**ASYNC), False, "vllm"),
        (run_config(**ASYNC), True, "vllm"),
        (run_config(**SYNC, model={"lora_type": "full"}), True, "torch"),
        (run_config(**ASYNC, model={"lora_type": "full"}), True, "vllm"),
        (run_config(**ASYNC, model={"train_vision": "full"}), True, "torch"),
        (run_config(**SYNC, model={"quantize_base": True}), False, "vllm"),
        (run_config(**SYNC, learner_ranks=2), False, "vllm"),
        (run_config(**SYNC, rollout={"sleep": True}), False, "vllm"),
    ],
    ids=lambda value: "" if isinstance(value, RunConfig) else str(value),
)
def test_what_auto_stands_for(cfg: RunConfig, on_gpu: bool, engine: str) -> None:
    assert resolved_engine(cfg, on_gpu=on_gpu, has_vllm=True).rollout.engine == engine
    if cfg.rollout.sleep is not True:
        assert resolved_engine(cfg, on_gpu=on_gpu, has_vllm=False).rollout.engine == "torch"


def test_an_engine_that_was_named_stays() -> None:
    cfg = run_config(**SYNC, rollout={"engine": "vllm"})
    assert resolved_engine(cfg, on_gpu=False, has_vllm=True) is cfg


def test_what_needs_vllm_says_so_without_it() -> None:
    with pytest.raises(ConfigError, match=r"rollout.sleep=true needs async_rl=false and rollout.engine=vllm"):
        resolved_engine(run_config(**SYNC, rollout={"sleep": True}), on_gpu=True, has_vllm=False)
