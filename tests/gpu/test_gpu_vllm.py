"""vLLM on a GPU, in the dtypes that its own LoRA kernels take and in float32, which they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import LOSS, config, make_batch, make_groups
from peft_reference import Reference
from tiny import make_text_model
from vllm_engines import request, start_engine

from learner.learner import Learner
from learner.shared_base import SharedBase
from tora.adapters.inject import trained_parameters

pytest.importorskip("vllm")


def check(folder: Path, kind: str, bound: float, targets: list[str] | None = None, **options: Any) -> None:
    reference = Reference(folder, targets)
    engine = start_engine(folder, enforce_eager=False, **options)
    try:
        for version in (1, 2, 3):  # the third overwrites the first one's slot, under graphs that have been recorded
            engine.install(reference.snapshot(version, kind, version))
            asked = request(num_samples=4, seed=version)
            for completion in engine.generate([asked])[0]:
                assert reference.error(kind, version, asked, completion) < bound
    finally:
        engine.close()


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-3), ("bf16", 0.1)])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_rollouts_are_of_the_policy(tmp_path: Path, family: str, kind: str, dtype: str, bound: float) -> None:
    """float32 products; 16-bit products of packed layers beside a float32 output; biases of qwen2 within the gain."""
    folder = make_text_model(tmp_path, family, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    check(folder, kind, bound, dtype=dtype)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-3), ("bf16", 0.1)])
def test_an_adapter_on_part_of_a_packed_layer(tmp_path: Path, dtype: str, bound: float) -> None:
    folder = make_text_model(tmp_path, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    check(folder, "dora", bound, ["q_proj", "v_proj"], dtype=dtype)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-3), ("bf16", 0.1)])
def test_plain_lora_without_the_gains_cost(tmp_path: Path, dtype: str, bound: float) -> None:
    folder = make_text_model(tmp_path, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    check(folder, "lora", bound, dtype=dtype, gains=False)


def test_a_step_holds_as_many_tokens_as_a_gpu_needs(tmp_path: Path) -> None:
    engine = start_engine(make_text_model(tmp_path))
    try:
        scheduler = engine._llm.vllm_config.scheduler_config
        assert scheduler.max_num_batched_tokens >= 8192 and scheduler.max_num_seqs == 256
        assert engine._llm.vllm_config.model_config.max_model_len == 256
    finally:
        engine.close()


def test_a_sleeping_engine_frees_its_cache_and_serves_on(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path)
    reference = Reference(folder)
    engine = start_engine(folder, enforce_eager=False, sleeps=True, gpu_memory_utilization=0.3)
    try:
        _, total = torch.cuda.mem_get_info()
        for version in (1, 2, 3):  # graphs were recorded once, with the addresses of the first cache
            engine.install(reference.snapshot(version, "dora", version))
            asked = request(num_samples=4, seed=version)
            (group,) = engine.generate([asked])
            awake = torch.cuda.mem_get_info()[0]
            engine.sleep()
            assert torch.cuda.mem_get_info()[0] - awake > 0.2 * total
            for completion in group:
                assert reference.error("dora", version, asked, completion) < 1e-3
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_learner_computes_with_vllms_weights(tmp_path: Path, dtype: Any) -> None:
    folder = make_text_model(tmp_path, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    engine = start_engine(folder, dtype=dtype, enforce_eager=False)
    try:
        cfg, shared = config(folder, "dora", loss=LOSS, dtype=dtype), SharedBase(engine.base_weights)
        learner, own = Learner(cfg, shared_base=shared), Learner(cfg)
        trained = trained_parameters(own.model)
        base = {name: p for name, p in own.model.named_parameters() if name not in trained}
        assert shared.nbytes == sum(p.nbytes for name, p in base.items() if not name.endswith(".scale"))
        for step in range(3):
            batch = make_batch(make_groups(3, seed=step))
            found, expected = learner.step(batch).metrics, own.step(batch).metrics
            assert found == pytest.approx(expected, rel=1e-5)
            engine.install(learner.snapshot())
            assert engine.generate([request()])[0]
    finally:
        engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_engine_is_on_the_gpu_that_it_was_given(tmp_path: Path) -> None:
    engine = start_engine(make_text_model(tmp_path), gpu=1)
    try:
        assert engine._llm.collective_rpc(lambda worker: str(worker.device)) == ["cuda:1"]
    finally:
        engine.close()


SHARED = """
import tora, sys, torch
from actors.vllm_engine.internals import warning
import vllm
print(warning(vllm.__version__) or "tested")
"""


def test_the_installed_vllm_is_a_tested_version() -> None:
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True)
    assert done.stdout.strip().endswith("tested"), done.stdout + done.stderr
