"""DoRA's gain over a bf16 base, by row, against the formula in float64 and against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tora.adapters.dora import CachedDoRALinear, DoRALinear
from tora.models.quantize import dequantize, quantize

INPUTS, OUTPUTS, RANK, TOKENS = 256, 64, 4, 2048
GAINS = torch.tensor([1.0005, 1.001, 1.002, 1.003, 1.005, 1.01, 1.02, 0.97]).repeat(OUTPUTS // 8)


def make_layer(kind: type[DoRALinear], quantized: bool = False) -> DoRALinear:
    """Row i has the gain GAINS[i], and an update of about 4 % of its output."""
    torch.manual_seed(0)
    base = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    if quantized:
        base.weight = nn.Parameter(quantize(base.weight.data, "weight"), requires_grad=False)
    layer = kind(base.requires_grad_(False), RANK, 1.0)
    layer.reset_adapter()
    nn.init.normal_(layer.lora_b, std=0.02)
    with torch.no_grad():
        norm_O = layer.local_row_norm(layer.lora_a)
        layer.magnitude.copy_(GAINS * norm_O)
        if isinstance(layer, CachedDoRALinear):
            layer.norm.copy_(norm_O)
    return layer


def adapted(layer: DoRALinear) -> torch.Tensor:
    """W + B A, float64."""
    weight: Any = layer.weight
    plain = weight.double() if weight.dtype == torch.bfloat16 and not hasattr(weight, "nf4") else dequantize(weight)
    return plain.double() + layer.lora_b.detach().double() @ layer.lora_a.detach().double()


def peft_layer(layer: DoRALinear) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], use_dora=True)
    base = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16))
    model: Any = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    theirs = model.base_model.model[0]
    with torch.no_grad():
        theirs.base_layer.weight.copy_(layer.weight)
        theirs.lora_A["default"].weight.copy_(layer.lora_a)
        theirs.lora_B["default"].weight.copy_(layer.lora_b)
        theirs.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    return theirs


def rms(error: torch.Tensor) -> float:
    return float(error.square().mean().sqrt())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", [DoRALinear, CachedDoRALinear])
def test_a_gain_acts_as_what_it_is(kind: type[DoRALinear], quantized: bool) -> None:
    layer, x = make_layer(kind, quantized), torch.randn(TOKENS, INPUTS).bfloat16()
    with torch.no_grad():
        output = layer(x)
    assert output.dtype == torch.bfloat16
    unit = x.double() @ adapted(layer).T
    acts_as_O = (output.double() * unit).sum(0) / unit.square().sum(0)
    by_gain, gains = acts_as_O.view(-1, 8).mean(0), GAINS[:8].double()
    assert ((by_gain - gains).abs() < 1e-4 + 0.02 * (gains - 1).abs()).all()
    exact = unit * GAINS
    assert rms(output.double() - exact) < 1.5 * rms(exact.bfloat16().double() - exact), "no more than two roundings"


def test_outputs_are_as_exact_as_peft() -> None:
    layer, x = make_layer(CachedDoRALinear), torch.randn(TOKENS, INPUTS).bfloat16()
    exact = x.double() @ adapted(layer).T * GAINS
    with torch.no_grad():
        ours, theirs = (rms(model(x).double() - exact) for model in (layer, peft_layer(layer)))
    assert ours < 1.05 * theirs


@pytest.mark.parametrize("kind", [DoRALinear, CachedDoRALinear])
def test_gradients_are_as_exact_as_peft(kind: type[DoRALinear]) -> None:
    layer, x = make_layer(kind), torch.randn(256, INPUTS).bfloat16()
    upstream = torch.randn(256, OUTPUTS).bfloat16()
    names = {
        "lora_a": "lora_A.default.weight",
        "lora_b": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    }
    exact_inputs = [x.double().requires_grad_(), *(getattr(layer, n).detach().double().requires_grad_() for n in names)]
    x64, a64, b64, m64 = exact_inputs
    total = layer.weight.double() + b64 @ a64
    y64 = x64 @ total.T * (m64 / total.detach().norm(dim=1))
    exact = torch.autograd.grad((y64 * upstream.double()).sum(), exact_inputs)

    def errors(model: Any, parameters: list[Any]) -> list[float]:
        inputs = [x.clone().requires_grad_(), *parameters]
        found = torch.autograd.grad((model(inputs[0]) * upstream).sum(), inputs)
        return [rms(f.double() - e) / rms(e) for f, e in zip(found, exact, strict=True)]

    theirs = peft_layer(layer)
    peft_errors = errors(theirs, [theirs.get_parameter(name) for name in names.values()])
    for name, ours, reference in zip(
        ["x", *names], errors(layer, [getattr(layer, n) for n in names]), peft_errors, strict=True
    ):
        assert ours < max(1.2 * reference, 2**-8), name
