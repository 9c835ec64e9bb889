"""The limits that vLLM gets: what a run needs, not what the model or the machine allows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.vllm_engine.config import EngineConfig
from tora.config.schema import ModelConfig, RolloutConfig, RunConfig
from tora.launch.engines import engine_config


def write_config(folder: Path, **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048, **keys}))
    return folder


def config_for(model: Path, rollout: RolloutConfig | None = None, gpu_share: float = 1.0, **keys: Any) -> EngineConfig:
    run = RunConfig(
        name="test",
        model=ModelConfig(path=str(model)),
        dataset={},
        rewards=[],
        rollout=rollout or RolloutConfig(),
        max_prompt_tokens=300,
        **{"max_generated_tokens": 200, **keys},
    )
    return engine_config(run, str(model), gpu_share)


def test_sequences_are_as_long_as_the_run_needs(tmp_path: Path) -> None:
    model = write_config(tmp_path)
    assert config_for(model).max_model_len == 500
    assert config_for(model, max_generated_tokens=4000).max_model_len is None, "the model's own limit"
    assert config_for(model, RolloutConfig(max_model_len=9000)).max_model_len == 9000, "as asked for; vLLM refuses it"


@pytest.mark.parametrize(("gpu_share", "utilization"), [(1.0, 0.9), (0.5, 0.45), (0.25, 0.225)])
def test_vllm_takes_its_share_of_the_gpu(tmp_path: Path, gpu_share: float, utilization: float) -> None:
    model = write_config(tmp_path)
    assert config_for(model, gpu_share=gpu_share).gpu_memory_utilization == pytest.approx(utilization)
    asked = RolloutConfig(gpu_memory_utilization=0.3)
    assert config_for(model, asked, gpu_share).gpu_memory_utilization == 0.3


def test_every_rollout_in_flight_runs_at_once(tmp_path: Path) -> None:
    model = write_config(tmp_path)
    assert config_for(model, RolloutConfig(concurrency=64), grpo_samples=16).max_num_seqs == 1024
    assert config_for(model, RolloutConfig(concurrency=1), grpo_samples=2).max_num_seqs == 128


@pytest.mark.parametrize(("device_type", "local_rank"), [("cuda", 3), ("cpu", 0)])
def test_under_torchrun_vllm_runs_on_the_ranks_own_gpu(device_type: str, local_rank: int) -> None:
    pytest.importorskip("vllm")
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from actors.vllm_engine.process import place

    config: Any = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device_type, device=torch.device(device_type))
    )
    place(config, 3)
    executor: Any = SimpleNamespace(vllm_config=config)
    assert UniProcExecutor._distributed_args(executor)[2] == local_rank


def test_the_engine_of_a_rank_is_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_config(tmp_path)
    assert config_for(model).gpu == 0
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert config_for(model).gpu == 2
