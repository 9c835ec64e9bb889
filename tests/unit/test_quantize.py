"""NF4 bases: quantisation against torchao, adapters over them against PEFT, memory, and dequantised folders."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import RANK, TYPES, build, check_against_peft, model_config, shake
from decoders import packed_logits, random_sequences
from learners import config
from safetensors.torch import load_file
from tiny import LINEARS, make_text_model
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from transformers import AutoModelForCausalLM

import tora.models.load
from learner.policy import build_policy
from tora.adapters.dora import DoRALinear
from tora.adapters.inject import LAYERS, adapter_layers, from_wire, snapshot
from tora.adapters.snapshot import unpack
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.models.dequantized import dequantized_folder, in_use
from tora.models.load import load_decoder
from tora.models.quantize import FrozenLinear, dequantize, frozen_linear, quantize, row_slabs, scaler_block_size

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
MODELS = {  # hidden size, query heads, key-value heads, head size, mlp
    "quickstart": (96, 3, 1, 32, 288),
    "Qwen2.5-0.5B": (896, 14, 2, 64, 4864),
    "Qwen2.5-1.5B": (1536, 12, 2, 128, 8960),
    "Qwen2.5-3B": (2048, 16, 2, 128, 11008),
    "Qwen2.5-7B": (3584, 28, 4, 128, 18944),
    "Qwen2.5-14B": (5120, 40, 8, 128, 13824),
    "Qwen2.5-32B": (5120, 40, 8, 128, 27648),
    "Qwen3-0.6B": (1024, 16, 8, 128, 3072),
    "Qwen3-1.7B": (2048, 16, 8, 128, 6144),
    "Qwen3-4B": (2560, 32, 8, 128, 9728),
    "Qwen3-8B": (4096, 32, 8, 128, 12288),
    "Qwen3-14B": (5120, 40, 8, 128, 17408),
    "Qwen3-32B": (5120, 64, 8, 128, 25600),
    "Llama-3.2-1B": (2048, 32, 8, 64, 8192),
    "Llama-3.2-3B": (3072, 24, 8, 128, 8192),
    "Llama-3.1-8B": (4096, 32, 8, 128, 14336),
}


def inner(weight: NF4Tensor) -> list[torch.Tensor]:
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (64, 128), (96, 96), (32, 96), (2500, 64)])
def test_a_round_trip_equals_torchaos(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    ours, theirs = quantize(weight, "w"), to_nf4(weight, 64, scaler_block_size(*shape))
    assert torch.equal(dequantize(ours), theirs.get_original_weight()) and ours.dtype == dtype
    error = (dequantize(ours).float() - weight.float()).norm() / weight.float().norm()
    assert 0.07 < error < 0.11
    slabs = list(row_slabs(ours))
    assert len(slabs) == math.ceil(shape[0] / 1024) and all(slab.dtype == torch.float32 for slab in slabs)
    assert torch.equal(torch.cat(slabs), dequantize(ours).float())


def test_a_block_of_zeros_stays_nearly_zero() -> None:
    weight = torch.randn(64, 64)
    weight[3] = 0
    assert dequantize(quantize(weight, "w"))[3].abs().max() < 0.05
    assert torch.equal(dequantize(quantize(torch.zeros(64, 64), "w")), torch.zeros(64, 64))


@pytest.mark.parametrize("model", MODELS)
def test_every_models_shapes_can_be_quantised_and_sharded(model: str) -> None:
    hidden, heads, kv_heads, head_dim, mlp = MODELS[model]
    for rows, columns in (
        (heads * head_dim, hidden), (kv_heads * head_dim, hidden), (hidden, heads * head_dim),
        (mlp, hidden), (hidden, mlp),
    ):  # fmt: skip
        size = scaler_block_size(rows, columns)
        assert model == "quickstart" or size >= 32, "16 bits per 32 x 64 weights: under 0.01 bits per weight"
        for ranks in (1, 2, 4, 8):
            assert rows % ranks == 0 and rows * columns // ranks % (64 * size) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_per_weight(dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(1024, 1024, dtype=dtype), "w")
    bits = 8 * sum(t.nbytes for t in inner(weight)) / weight.numel()
    assert 4.125 < bits < 4.135


def test_a_weight_that_cannot_be_quantised_is_named() -> None:
    for shape in ((3, 5), (64,)):
        with pytest.raises(
            ConfigError, match=r"model.quantize_base=true: model\.x\.weight has shape .* multiple of 64"
        ):
            quantize(torch.zeros(shape), "model.x.weight")


def test_a_number_of_ranks_that_cannot_shard_nf4_is_refused(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path)
    for ranks in (1, 2, 4, 8):
        build_policy(config(folder, quantize_base=True, learner_ranks=ranks), CPU)
    with pytest.raises(ConfigError, match=r"learner_ranks=3 cannot share layers\.0\.attn\.q_proj\.weight.* 128 x 128"):
        build_policy(config(folder, quantize_base=True, learner_ranks=3), CPU)


def test_configs_that_contradict_quantisation_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantize_base=true freezes the base"):
        load_config("quickstart", ["model.quantize_base=true", "model.lora_type=full"])
    for overrides in (["rollout.engine=torch", "model.quantize_base=true"], ["rollout.engine=vllm"]):
        with pytest.raises(ConfigError, match=r"rollout.base=checkpoint needs"):
            load_config("quickstart", ["rollout.base=checkpoint", *overrides])


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_quantises_linear_weights_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    folder = make_text_model(tmp_path, "qwen2", tied=False)
    plain: list[weakref.ref[torch.Tensor]] = []

    def spy(weight: torch.Tensor, name: str) -> NF4Tensor:
        assert not any(earlier() is not None for earlier in plain), "an earlier weight is still held in full precision"
        plain.append(weakref.ref(weight))
        return quantize(weight, name)

    monkeypatch.setattr(tora.models.load, "quantize", spy)
    model = load_decoder(folder, dtype=dtype, device=CPU, quantize_base=True)
    checkpoint, quantized = load_file(folder / "model.safetensors"), set()
    for name, parameter in model.named_parameters():
        hf = model.names.parameter_to_hf(name)
        expected = checkpoint[hf].to(torch.float32 if "norm" in hf else dtype)
        assert not parameter.requires_grad and isinstance(parameter, nn.Parameter)
        if isinstance(parameter, NF4Tensor):
            quantized.add(hf)
            parameter, expected = dequantize(parameter), dequantize(quantize(expected, hf))
        assert parameter.dtype == expected.dtype and torch.equal(parameter, expected)
    assert quantized == {n for n in checkpoint if n.endswith("_proj.weight")} and len(quantized) == 2 * len(LINEARS)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])  # without and with biases
@pytest.mark.parametrize("lora_type", TYPES)
def test_outputs_and_gradients_equal_peft_on_the_dequantised_base(tmp_path: Path, family: Any, lora_type: str) -> None:
    folder = make_text_model(tmp_path / "base", family)
    base = dequantized_folder(folder, tmp_path / "cache", dtype=torch.float32, device=CPU)
    check_against_peft(model_config(folder, lora_type, quantize_base=True), base, tmp_path / "adapter")


def test_layers_without_an_adapter_equal_the_base(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "base")
    base = dequantized_folder(folder, tmp_path / "cache", dtype=torch.float32, device=CPU)
    model = build(model_config(folder, "dora_cache", quantize_base=True, lora_targets=["q_proj"]))
    assert len([m for m in model.modules() if isinstance(m, FrozenLinear)]) == 2 * (len(LINEARS) - 1)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    (sequence,) = random_sequences(20)
    torch.testing.assert_close(
        packed_logits(model, [sequence]), expected(sequence[None]).logits[0], atol=1e-4, rtol=1e-5
    )


def test_a_snapshot_transfers_a_quantised_policy(tmp_path: Path) -> None:
    cfg = model_config(make_text_model(tmp_path), "dora_cache", quantize_base=True)
    sender, receiver = build(cfg), build(cfg)
    shake(sender)
    tensors = unpack(snapshot(sender, 1))
    assert from_wire(receiver, tensors) == 2 * len(LINEARS)
    sequences = random_sequences(9, 15)
    torch.testing.assert_close(packed_logits(receiver, sequences), packed_logits(sender, sequences))
    layer = adapter_layers(sender)["model.layers.1.mlp.up_proj"]
    assert isinstance(layer, DoRALinear)
    update = layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    norm_O = (dequantize(layer.weight).double() + update).norm(dim=1)
    gain = tensors["model.layers.1.mlp.up_proj.gain"].double()
    torch.testing.assert_close(gain * norm_O, layer.magnitude.double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norms_equal_float64(dtype: torch.dtype) -> None:
    base = FrozenLinear(64, 2500, bias=False)
    base.weight = nn.Parameter(quantize(torch.randn(2500, 64, dtype=dtype), "w"), requires_grad=False)
    layer = DoRALinear(base, rank=5, scaling=1.7)
    layer.reset_adapter()
    nn.init.normal_(layer.lora_b, std=0.1)
    weight = dequantize(base.weight).double()
    torch.testing.assert_close(layer.magnitude.double(), weight.norm(dim=1), atol=1e-6, rtol=1e-6)
    expected = (weight + 1.7 * layer.lora_b.double() @ layer.lora_a.double()).norm(dim=1)
    torch.testing.assert_close(layer.local_row_norm(layer.lora_a).double(), expected, atol=1e-6, rtol=1e-5)


class Pair(nn.Module):
    """Two linear layers with a nonlinearity between them, as in a model."""

    def __init__(self, lora_type: str | None, hidden: int, mlp: int) -> None:
        super().__init__()
        self.up, self.down = (self._layer(lora_type, i, o) for i, o in ((hidden, mlp), (mlp, hidden)))

    @staticmethod
    def _layer(lora_type: str | None, inputs: int, outputs: int) -> nn.Module:
        base = FrozenLinear(inputs, outputs).requires_grad_(False)
        base.weight = nn.Parameter(quantize(base.weight.data, "w"), requires_grad=False)
        if lora_type is None:
            return base
        layer = LAYERS[lora_type](base, RANK, 2.0)
        layer.reset_adapter()
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))

    def held(self) -> set[int]:
        """Addresses of the parameters and buffers, which are held anyway."""
        parts = [t for p in self.parameters() for t in (inner(p) if isinstance(p, NF4Tensor) else [p])]
        return {t.data_ptr() for t in [*parts, *self.buffers()]}


def saved_bytes(module: Any, x: torch.Tensor, held: set[int]) -> tuple[torch.Tensor, int]:
    """The output, and the bytes that are saved for backward beyond what is `held`."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, NF4Tensor) and tensor.data_ptr() not in held | {x.data_ptr()}:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    return y, sum(saved.values())


@pytest.mark.parametrize("lora_type", [None, *TYPES])
def test_the_backward_pass_keeps_no_dequantised_weight(lora_type: str | None) -> None:
    torch.manual_seed(0)
    pair, x = Pair(lora_type, 256, 512), torch.randn(4, 256, requires_grad=True)
    one_weight = 4 * 256 * 512
    y, eager = saved_bytes(pair, x, pair.held())
    expected = torch.autograd.grad(y.square().sum(), [x, *(p for p in pair.parameters() if p.requires_grad)])
    assert eager < 0.1 * one_weight

    torch._dynamo.reset()
    compiled = torch.compile(pair, fullgraph=True, dynamic=True)
    y_compiled, in_graph = saved_bytes(compiled, x, pair.held())
    torch.testing.assert_close(y_compiled, y, atol=1e-5, rtol=1e-5)
    actual = torch.autograd.grad(y_compiled.square().sum(), [x, *(p for p in pair.parameters() if p.requires_grad)])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert in_graph < 0.1 * one_weight, "inductor saves both decoded weights unless told to recompute them"


def test_bf16_computes_in_bf16() -> None:
    weight = quantize(torch.randn(128, 64, dtype=torch.bfloat16), "w")
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    y = frozen_linear(x, weight, torch.ones(128, dtype=torch.bfloat16))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == torch.bfloat16
    assert torch.equal(y, nn.functional.linear(x, dequantize(weight)) + 1)
    assert torch.equal(gradient, torch.ones_like(y) @ dequantize(weight))


def test_a_dequantised_folder_is_complete_and_reused_until_its_source_changes(tmp_path: Path) -> None:
    single, cache = make_text_model(tmp_path / "single", "qwen2", tied=False), tmp_path / "cache"
    source = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(source, max_shard_size="200KB")
    for file in single.glob("tokenizer*"):
        shutil.copy(file, source)
    folder = dequantized_folder(source, cache, dtype=torch.float32, device=CPU)
    assert {f.name for f in folder.iterdir()} == {f.name for f in source.iterdir()}
    assert len(list(folder.glob("*.safetensors"))) > 1
    before = {n: t for f in source.glob("*.safetensors") for n, t in load_file(f).items()}
    after = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    for name, tensor in before.items():
        changed = name.endswith("_proj.weight")
        assert torch.equal(after[name], dequantize(quantize(tensor, name)) if changed else tensor)

    stamp = folder.stat().st_mtime_ns
    (cache / f".{folder.name}").mkdir()  # left by a process that died while writing
    assert dequantized_folder(source, cache, dtype=torch.float32, device=CPU) == folder
    assert folder.stat().st_mtime_ns == stamp
    others = [dequantized_folder(source, cache, dtype=torch.bfloat16, device=CPU)]
    (source / "config.json").touch()
    others.append(dequantized_folder(source, cache, dtype=torch.float32, device=CPU))
    assert len({folder, *others}) == 3


def test_the_last_user_of_a_dequantised_folder_deletes_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = (
        "import time; from pathlib import Path; from tora.models.dequantized import in_use\n"
        f"with in_use(Path({str(cache)!r})): print('in', flush=True); time.sleep(60)"
    )
    with in_use(cache):
        with in_use(cache):
            (cache / "model.safetensors").write_bytes(b"weights")
        assert (cache / "model.safetensors").exists(), "the outer context still uses it"
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert other.stdout and other.stdout.readline() == "in\n"
        other.kill()
        other.wait()
        assert cache.exists()
    assert not cache.exists(), "a killed process does not keep the folder"
