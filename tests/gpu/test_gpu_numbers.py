"""Kernels of the learner and the torch engine: a GPU's results are the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learners import config, train
from tiny import make_text_model
from torch_engines import engine_of

from learner.learner import Learner
from learner.logprobs import token_logprobs
from tora.models.quantize import dequantize, quantize
from tora.types import LogprobRequest, SampleRequest, Sampling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_cpus(dtype: torch.dtype) -> None:
    """Codes are looked up in pairs, by uint16 where the weights have 16 bits. Blocks' scales may round differently."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    here = quantize(weight.cuda(), "w")
    there = quantize(weight, "w")
    torch.testing.assert_close(dequantize(here).cpu(), dequantize(there), rtol=1e-6, atol=0)


def test_chunks_of_a_gpu_give_the_cpus_log_probs() -> None:
    """151,936 words: 220 rows a chunk on a CPU, four times as many on a GPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 64, generator=generator)
    head = 0.1 * torch.randn(151_936, 64, generator=generator)
    targets = torch.randint(0, len(head), (1000,), generator=generator)
    expected = token_logprobs(hidden, head, targets, temperature=0.9)
    torch.cuda.reset_peak_memory_stats()
    found = token_logprobs(hidden.cuda(), head.cuda(), targets.cuda(), temperature=0.9)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
    assert torch.cuda.max_memory_allocated() < 2**31


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_torch_engine_samples_from_what_the_learner_scores(tmp_path: Path, dtype: str, graphs: bool) -> None:
    folder = make_text_model(tmp_path, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    engine = engine_of(Learner(config(folder, "dora", device="cuda", dtype=dtype)), cuda_graphs=graphs)
    prompt = tuple(range(20, 60))
    group = engine.generate([SampleRequest(prompt, 4, 1, Sampling(40))])[0]
    for completion in group:
        (scored,) = engine.logprobs([LogprobRequest(prompt, tuple(completion.token_ids.tolist()))], adapter=True)
        gap = torch.from_numpy(abs(scored - completion.logprobs))
        assert float(gap.mean()) < (1e-4 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize("lora_type", ["full", "lora", "dora_cache"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_is_the_cpus(tmp_path: Path, lora_type: str, dtype: str) -> None:
    folder = make_text_model(tmp_path, "qwen2")
    here = train(folder, lora_type, device="cuda", dtype=dtype)
    there = train(folder, lora_type, device="cpu", dtype=dtype)
    bound = 1e-3 if dtype == "fp32" else 0.1
    for a, b in zip(here[0], there[0], strict=True):
        assert abs(a["loss/total"] - b["loss/total"]) < bound
        assert abs(a["learner/grad_norm"] / b["learner/grad_norm"] - 1) < bound
