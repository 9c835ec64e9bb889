"""The learner and the torch engine in bf16 against PEFT in float32: no further from it than PEFT in bf16 is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import loss_of, shake
from decoders import packed_logits
from learners import config, make_batch, make_groups
from peft import PeftModel
from tiny import make_text_model
from torch_engines import engine_of
from transformers import AutoModelForCausalLM

from learner.learner import Learner
from tora.adapters.inject import trained_parameters
from tora.adapters.peft_format import peft_tensors
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.types import LogprobRequest, Prompt, Rollout, SampleRequest, Sampling, StopReason

PROMPT = tuple(range(5, 15))
COMPLETIONS = tuple(tuple((step * i + 7 * step) % 250 + 3 for i in range(40)) for step in (3, 7, 11))
METHODS = [("lora", False), ("dora", False), ("dora_cache", False), ("lora", True), ("dora_cache", True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), "qwen2", dtype=torch.bfloat16)


def make_learner(folder: Path, lora_type: str, **changes: Any) -> Learner:
    learner = Learner(config(folder, lora_type, dtype="bf16", **changes))
    shake(learner.model)
    return learner


def batch_of(completions: tuple[tuple[int, ...], ...]) -> Any:
    prompt = Prompt(0, PROMPT, "", {})

    def rollout(ids: tuple[int, ...]) -> Rollout:
        n = len(ids)
        zeros = np.zeros(n, np.float32)
        return Rollout(np.array(ids), np.ones(n, bool), zeros, np.zeros(n, np.int64), StopReason.LENGTH, "", 0.0, {})

    return pack(OwnPrompts(), [(prompt, rollout(ids), 0.0, i) for i, ids in enumerate(completions)], [1.0] * 3)


def theirs(learner: Learner, folder: Path, adapter: Path, dtype: torch.dtype) -> Any:
    learner.export(adapter)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    found = []
    for ids in COMPLETIONS:
        logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1].float()
        found.append(logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    return torch.cat(found)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


@pytest.mark.parametrize("lora_type", ["lora", "dora", "dora_cache"])
def test_logprobs_are_as_exact_as_peft(tmp_path: Path, folder: Path, lora_type: str) -> None:
    learner = make_learner(folder, lora_type, lm_head_fp32=True)
    exact, alike = (theirs(learner, folder, tmp_path, dtype) for dtype in (torch.float32, torch.bfloat16))
    found = {on: torch.from_numpy(learner.logprobs(batch_of(COMPLETIONS), adapter=on)) for on in (True, False)}
    expected = logprobs(exact)
    bound = gap(logprobs(alike), expected)
    with exact.disable_adapter(), alike.disable_adapter():
        base = logprobs(exact)
        base_bound = gap(logprobs(alike), base)
    assert gap(found[True], expected) < 1.2 * bound and gap(found[False], base) < 1.2 * base_bound
    assert gap(expected, base) > 10 * bound, "the adapter stands out"


@pytest.mark.parametrize("lora_type", ["lora", "dora", "dora_cache"])
def test_gradients_are_as_exact_as_peft(tmp_path: Path, folder: Path, lora_type: str) -> None:
    learner = make_learner(folder, lora_type)
    sequence = torch.tensor([*PROMPT, *COMPLETIONS[0]])
    loss_of(packed_logits(learner.model, [sequence]).float()).backward()
    ours: Any = {name: p.grad for name, p in peft_tensors(learner.model).items()}

    def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = theirs(learner, folder, tmp_path, dtype)
        loss_of(model(sequence[None]).logits[0].float()).backward()
        named = model.named_parameters()
        return {n.replace(".default", ""): p.grad for n, p in named if p.requires_grad}

    exact, alike = (gradients(dtype) for dtype in (torch.float32, torch.bfloat16))
    strip = ".weight"
    alike = {n.removesuffix(strip) if "magnitude" in n else n: g for n, g in alike.items()}
    exact = {n.removesuffix(strip) if "magnitude" in n else n: g for n, g in exact.items()}
    assert ours.keys() == exact.keys() == alike.keys()
    for kind in ("lora_A", "lora_B", *(["magnitude"] if lora_type != "lora" else [])):
        names = [name for name in exact if kind in name]
        expected, found, bound = (torch.cat([g[n].flatten().float() for n in names]) for g in (exact, ours, alike))
        assert (found - expected).norm() < 1.2 * (bound - expected).norm(), kind


@pytest.mark.parametrize(("lora_type", "quantized"), METHODS)
def test_the_torch_engine_samples_from_the_learners_policy(folder: Path, lora_type: str, quantized: bool) -> None:
    """Decoding a token at a time rounds differently from packed sequences: by no more than bf16 costs."""
    learner = make_learner(folder, lora_type, quantize_base=quantized, lm_head_fp32=True)
    exact = Learner(config(folder, lora_type, quantize_base=quantized))
    shake(exact.model)
    engine = engine_of(learner)
    (completions,) = engine.generate([SampleRequest(PROMPT, 3, 0, Sampling(40))])
    ids = tuple(tuple(c.token_ids.tolist()) for c in completions)
    sampled = np.concatenate([c.logprobs for c in completions])
    mine, cost = (each.logprobs(batch_of(ids), adapter=True) for each in (learner, exact))
    bound = np.abs(mine - cost).mean()
    assert bound > 0
    assert np.abs(sampled - mine).mean() < 1.5 * bound
    asked = [LogprobRequest(PROMPT, each) for each in ids]
    assert np.abs(np.concatenate(engine.logprobs(asked, adapter=True)) - mine).mean() < 1.5 * bound


@pytest.mark.parametrize("lora_type", ["lora", "dora_cache"])
def test_small_steps_move_every_adapter_tensor(folder: Path, lora_type: str) -> None:
    changes: dict[str, Any] = {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-6, "weight_decay": 0.0}}
    learner = make_learner(folder, lora_type, **changes)
    before = {name: p.detach().clone() for name, p in trained_parameters(learner.model).items()}
    learner.step(make_batch(make_groups()))
    for name, p in trained_parameters(learner.model).items():
        assert p.dtype == torch.float32 and (p != before[name]).float().mean() > 0.9, name
