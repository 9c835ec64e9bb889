"""LoRA and DoRA against PEFT in float32, and the numerical traps that keep DoRA from learning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ALPHA, TYPES, build, check_against_peft, model_config, shake
from decoders import packed_logits, random_sequences
from peft import LoraConfig, get_peft_model
from peft_reference import RANK
from tiny import LINEARS, make_text_model
from torch import nn
from transformers import AutoModelForCausalLM

from tora.adapters.dora import CachedDoRALinear, DoRALinear
from tora.adapters.inject import (
    LAYERS,
    adapter_layers,
    adapters_off,
    from_wire,
    refresh,
    snapshot,
    trained_parameters,
)
from tora.adapters.lora import LoRALinear
from tora.adapters.peft_format import load_peft
from tora.adapters.snapshot import GAIN, digest, pack, unpack
from tora.errors import ConfigError
from tora.models.load import load_decoder


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])  # without and with biases
@pytest.mark.parametrize("lora_type", TYPES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients_equal_peft(tmp_path: Path, family: Any, lora_type: str, use_rslora: bool) -> None:
    folder = make_text_model(tmp_path / "base", family)
    cfg = model_config(folder, lora_type, use_rslora=use_rslora)
    check_against_peft(cfg, folder, tmp_path / "adapter")


@pytest.mark.parametrize("lora_type", TYPES)
def test_a_peft_adapter_loads(tmp_path: Path, lora_type: str) -> None:
    folder = make_text_model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(5)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), use_dora=lora_type != "lora", init_lora_weights=False
    )
    theirs = get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "adapter")
    cfg = model_config(folder, lora_type)
    ours = build(cfg)
    load_peft(ours, cfg, tmp_path / "adapter")
    sequence = random_sequences(17)
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logits(ours, sequence), theirs(sequence[0][None]).logits[0], atol=1e-4, rtol=1e-5
        )

    wrong = model_config(folder, lora_type, lora_targets=["q_proj"])
    with pytest.raises(ConfigError, match="differ in"):
        load_peft(build(wrong), wrong, tmp_path / "adapter")
    cfg.lora_alpha = 11.0
    with pytest.raises(ConfigError, match="lora_alpha"):
        load_peft(ours, cfg, tmp_path / "adapter")


@pytest.mark.parametrize("lora_type", TYPES)
def test_an_adapter_starts_as_its_base_and_off_is_the_base(tmp_path: Path, lora_type: str) -> None:
    cfg = model_config(make_text_model(tmp_path), lora_type)
    base = load_decoder(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    model, sequence = build(cfg), random_sequences(12)
    with torch.no_grad():
        expected = packed_logits(base, sequence)
        torch.testing.assert_close(packed_logits(model, sequence), expected, atol=1e-4, rtol=1e-5)
        shake(model)
        assert (packed_logits(model, sequence) - expected).abs().max() > 0.1
        with adapters_off(model):
            assert torch.equal(packed_logits(model, sequence), expected)
        assert (packed_logits(model, sequence) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_norm_equals_the_norm_of_the_sum_in_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(48, 2500, dtype=dtype), rank=5, scaling=1.7)  # more rows than a slab
    layer.reset_adapter()
    torch.testing.assert_close(layer.magnitude.data, layer.weight.double().norm(dim=1).float(), atol=1e-6, rtol=1e-6)
    nn.init.normal_(layer.lora_b, std=0.1)
    summed = layer.weight.double() + 1.7 * layer.lora_b.double() @ layer.lora_a.double()
    torch.testing.assert_close(layer.local_row_norm(layer.lora_a).double(), summed.norm(dim=1), atol=1e-6, rtol=1e-5)


def train(layer: DoRALinear, steps: int) -> list[torch.Tensor]:
    """AdamW on two micro-batches per step, refreshing the norms after each step as the learner does."""
    generator = torch.Generator().manual_seed(6)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        for _ in range(2):
            x = torch.randn(8, layer.in_features, generator=generator)
            loss = (layer(x) - x[:, :1]).square().mean()
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        refresh(layer)
    return losses


def test_the_cached_norm_is_exact_in_training_and_the_magnitude_learns() -> None:
    layers = []
    for kind in (DoRALinear, CachedDoRALinear):
        torch.manual_seed(1)
        base = nn.Linear(16, 24)
        base.requires_grad_(False)
        layer = kind(base, rank=3, scaling=2.0)
        layer.reset_adapter()
        layers.append(layer)
    start = layers[0].magnitude.detach().clone()
    with torch.no_grad():
        layers[1](torch.randn(4, 16))  # a pass without gradients must not detach the magnitude in later ones
    torch.testing.assert_close(*(torch.stack(train(layer, 30)) for layer in layers), atol=1e-6, rtol=1e-5)
    assert ((layers[1].magnitude - start).abs() > 1e-3).all()


def test_a_small_learning_rate_moves_magnitudes_over_a_bf16_base() -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
    layer = CachedDoRALinear(base, rank=4, scaling=1.0)
    layer.reset_adapter()
    start = layer.magnitude.detach().clone()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-5)
    for _ in range(10):
        layer(torch.randn(8, 64, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        refresh(layer)
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    assert (layer.magnitude != start).float().mean() > 0.95


@pytest.mark.parametrize("lora_type", TYPES)
def test_a_snapshot_carries_the_policy(tmp_path: Path, lora_type: str) -> None:
    cfg = model_config(make_text_model(tmp_path, "qwen2"), lora_type, lora_targets=["q_proj", "v_proj", "down_proj"])
    sender, receiver, sequence = build(cfg), build(cfg), random_sequences(15)
    shake(sender)
    sent = snapshot(sender, 7)
    tensors = unpack(sent)
    assert sent.version == 7 and sent.nbytes == sum(t.nbytes for t in tensors.values())
    assert digest(tensors) == sent.sha256
    assert any(name.endswith(GAIN) for name in tensors) == (lora_type != "lora")
    assert from_wire(receiver, tensors) == 2 * 3
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logits(receiver, sequence), packed_logits(sender, sequence), atol=1e-4, rtol=1e-5
        )
    dropped = "model.layers.1.self_attn.v_proj"
    with pytest.raises(ValueError, match="differ in 1"):
        from_wire(receiver, {n: t for n, t in tensors.items() if not n.startswith(dropped)})
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    assert digest(tensors) != sent.sha256


def test_a_snapshot_owns_its_memory(tmp_path: Path) -> None:
    model = build(model_config(make_text_model(tmp_path), "lora"))
    sent = snapshot(model, 0)
    before = {name: t.clone() for name, t in unpack(sent).items()}
    unpack(sent)[next(iter(before))].fill_(9)  # an engine may scale its copy in place
    shake(model)
    assert all(torch.equal(t, before[name]) for name, t in unpack(sent).items())


def test_a_snapshot_is_gathered_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{n}.weight": torch.full((n, 3), float(n)) for n in range(1, 9)}
    asked: list[list[str]] = []

    def gather(some: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        asked.append(list(some))
        return some

    expected = pack(0, tensors)
    monkeypatch.setattr("tora.adapters.snapshot.BUCKET_BYTES", 100)
    found = pack(0, tensors, gather)
    assert len(asked) > 3 and [name for some in asked for name in some] == list(tensors), "each once, in order"
    assert all(sum(tensors[name].nbytes for name in some) <= 100 for some in asked)
    assert found.sha256 == expected.sha256 == digest(tensors)
    assert (found.data == expected.data).all()


def test_a_target_that_matches_nothing_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'qproj'.*'q_proj'"):
        build(model_config(make_text_model(tmp_path), "lora", lora_targets=["qproj"]))


def test_only_adapters_are_trained(tmp_path: Path) -> None:
    for lora_type in LAYERS:
        model = build(model_config(make_text_model(tmp_path), lora_type))
        leaves = {name.rpartition(".")[2] for name in trained_parameters(model)}
        assert leaves == ({"lora_a", "lora_b"} if lora_type == "lora" else {"lora_a", "lora_b", "magnitude"})
        assert all(isinstance(m, LoRALinear) for m in adapter_layers(model).values())
