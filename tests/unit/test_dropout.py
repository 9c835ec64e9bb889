"""LoRA dropout: placed as PEFT places it, in training passes alone, and reproducible."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import model_config, shake
from decoders import packed_logits, random_sequences
from learners import config, make_batch, make_groups, weights
from peft import PeftModel
from references import KL, SEEN
from tiny import make_text_model
from torch import nn
from torch_engines import engine_of
from transformers import AutoModelForCausalLM

from learner.learner import Learner
from tora.adapters.inject import LAYERS, adapter_layers, inject
from tora.adapters.peft_format import peft_config, peft_tensors, save_peft
from tora.adapters.targets import adapter_shapes
from tora.config.schema import RunConfig
from tora.models.load import load_decoder
from tora.types import SampleRequest, Sampling

RATE = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), "qwen2")


def dropping(folder: Path, lora_type: str = "lora", rate: float = RATE, **changes: Any) -> RunConfig:
    cfg = config(folder, lora_type, **changes)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, lora_dropout=rate))


@pytest.mark.parametrize("lora_type", ["lora", "dora", "dora_cache"])
def test_outputs_and_gradients_equal_pefts_in_training_mode(folder: Path, tmp_path: Path, lora_type: str) -> None:
    """Both draw one mask a layer, in the order of the layers, so equal seeds give equal masks."""
    cfg = model_config(folder, lora_type, lora_dropout=RATE)
    ours = load_decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    inject(ours, lora_type, adapter_shapes(ours, cfg), dropout=RATE)
    shake(ours)
    save_peft(peft_tensors(ours), peft_config(ours, cfg), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True).train()
    (sequence,), logits = random_sequences(21), []
    for run in (lambda: packed_logits(ours.train(), [sequence]), lambda: theirs(sequence[None]).logits[0]):
        torch.manual_seed(3)
        logits.append(run())
        (logits[-1] * torch.linspace(-1, 1, logits[-1].numel()).view_as(logits[-1])).mean().backward()
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        assert (packed_logits(ours.eval(), [sequence]) - logits[0]).abs().max() > 0.1, "the masks matter"
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for module, layer in adapter_layers(ours).items():
        for name, theirs_name in (("lora_a", "lora_A"), ("lora_b", "lora_B"), ("magnitude", "lora_magnitude_vector")):
            if name in layer.adapter_params():
                gradient = expected.pop(f"base_model.model.{module}.{theirs_name}.default.weight")
                torch.testing.assert_close(getattr(layer, name).grad, gradient, atol=1e-6, rtol=1e-3)
    assert not expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_type", ["lora", "dora_cache"])
def test_the_mean_over_masks_is_the_output_without_dropout(lora_type: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[lora_type](nn.Linear(24, 16, dtype=dtype), 4, 2.0, RATE)
    layer.reset_adapter()
    nn.init.normal_(layer.lora_b, std=0.5)
    x = torch.randn(3, 24, dtype=dtype)
    with torch.no_grad():
        exact = layer.eval()(x).float()
        draws = torch.stack([layer.train()(x).float() for _ in range(4000)])
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5 + (0.01 if dtype == torch.bfloat16 else 0))
    assert draws.std(0).min() > 0.01 and error.max() < 4.5, "standard errors of 48 numbers"


def test_only_training_passes_drop(folder: Path) -> None:
    groups, results = make_groups(), []
    batch = make_batch(groups)
    for rate in (0.0, RATE):
        learner = Learner(dropping(folder, "dora_cache", rate, loss=KL))
        shake(learner.model)
        (before,) = [learner.logprobs(m, adapter=True) for m in batch.micro_batches]
        request = SampleRequest((5, 6, 7), 4, 1, Sampling(12))
        tokens = [c.token_ids.tolist() for c in engine_of(learner).generate([request])[0]]
        results.append((tokens, learner.step(batch).metrics, before.tolist()))
        x = SEEN[-1]
        torch.testing.assert_close(x.proximal_logprobs_N, torch.from_numpy(before), atol=1e-5, rtol=1e-5)
        assert (x.learner_logprobs_N - x.proximal_logprobs_N).abs().max() > 1e-2 or rate == 0
        assert not learner.model.training
    (plain, without, at_start), (dropped, with_, at_start_too) = results
    assert plain == dropped and at_start == at_start_too
    for name in without:
        if name.startswith(("mismatch", "importance/ess", "importance/ratio")):
            assert without[name] == pytest.approx(with_[name], rel=1e-4), name


@pytest.mark.parametrize("kind", ["lora", "dora_cache"])
def test_masks_follow_from_the_seed_and_survive_a_resume(folder: Path, tmp_path: Path, kind: str) -> None:
    batches = [make_batch(make_groups(seed=i), capacity=60) for i in range(3)]
    learners = [Learner(dropping(folder, kind, ppo_epochs=2)) for _ in range(2)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    learners[0].step(batches[0])
    assert torch.equal(torch.get_rng_state(), state), "the process's own numbers are untouched"
    torch.rand(7)
    learners[1].step(batches[0])
    assert all(torch.equal(t, weights(learners[1])[n]) for n, t in weights(learners[0]).items())
    learners[0].save(tmp_path)
    results = [learners[0].step(b) for b in batches[1:]]
    resumed = Learner(dropping(folder, kind, ppo_epochs=2))
    resumed.restore(tmp_path)
    assert [resumed.step(b) for b in batches[1:]] == results
    other = Learner(dataclasses.replace(dropping(folder, kind, ppo_epochs=2), seed=5))
    other.restore(tmp_path)
    assert [other.step(b) for b in batches[1:]] != results


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_layers_draw_the_same_masks(folder: Path, kind: str) -> None:
    batch = make_batch(make_groups(), capacity=60)
    kept, recomputed = (
        Learner(dropping(folder, "dora")),
        Learner(dropping(folder, "dora", activation_checkpointing=kind)),
    )
    for _ in range(2):
        assert kept.step(batch) == recomputed.step(batch)
    assert all(torch.equal(t, weights(recomputed)[n]) for n, t in weights(kept).items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora_cache"])
def test_compiled_layers_drop_reproducibly(folder: Path, kind: str) -> None:
    batch = make_batch(make_groups(), capacity=60)
    a, b = (
        Learner(dropping(folder, kind, compile=True, activation_checkpointing="selective", loss=KL)) for _ in range(2)
    )
    for _ in range(2):
        assert a.step(batch) == b.step(batch)
        assert (SEEN[-1].learner_logprobs_N - SEEN[-1].proximal_logprobs_N).abs().max() > 1e-3


def test_the_exported_config_states_it(folder: Path, tmp_path: Path) -> None:
    Learner(dropping(folder)).export(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == RATE


def test_a_run_of_all_weights_ignores_it(folder: Path) -> None:
    plain, with_rate = Learner(dropping(folder, "full", 0.0)), Learner(dropping(folder, "full"))
    batch = make_batch(make_groups())
    assert plain.step(batch) == with_rate.step(batch)
