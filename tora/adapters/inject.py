"""Inject adapters into a model, and operate on all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tora.adapters.dora import CachedDoRALinear, DoRALinear
from tora.adapters.lora import LoRALinear
from tora.adapters.snapshot import pack, split_by_module
from tora.adapters.targets import AdapterShape
from tora.distributed.sharding import from_local_rows, gather
from tora.models.base import Decoder
from tora.types import PolicySnapshot

LAYERS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear, "dora_cache": CachedDoRALinear}


def inject(model: Decoder, lora_type: str, shapes: Mapping[str, AdapterShape], *, dropout: float = 0.0) -> None:
    """Replace the linear layers that `adapter_shapes` names by layers with an adapter. Freezes the base.

    `dropout`: of the adapters' inputs, in training mode.

    If the model is on the meta device, call `reset_adapters` after loading its weights.
    """
    model.requires_grad_(False)
    for name, shape in shapes.items():
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = LAYERS[lora_type](linear, shape.rank, shape.scaling, dropout)
        if not linear.weight.is_meta:
            layer.reset_adapter()
        setattr(model.get_submodule(parent), leaf, layer)


def reset_adapters(unit: nn.Module) -> None:
    """Initialise the adapters of a unit whose base weights were loaded since `inject`."""
    for module in unit.modules():
        if isinstance(module, LoRALinear) and module.lora_a.is_meta:
            module.reset_adapter()


def adapter_layers(model: Decoder) -> dict[str, LoRALinear]:
    """All adapter layers by Hugging Face module name, in the model's order."""
    return {model.names.module_to_hf(name): m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trained_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """All trained parameters, by the model's own parameter name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def row_norms(layers: Mapping[str, LoRALinear]) -> dict[str, torch.Tensor]:
    """‖W + s·B A‖ by row of each DoRA layer, full [O] float32. Collective, in two gathers: all A, then all norms."""
    dora = {name: layer for name, layer in layers.items() if isinstance(layer, DoRALinear)}
    lora_a = gather({name: layer.lora_a for name, layer in dora.items()})
    return gather({n: from_local_rows(layer.local_row_norm(lora_a[n]), layer.weight) for n, layer in dora.items()})


@torch.no_grad()
def refresh(model: Decoder) -> None:
    """Recompute cached norms; call after every change of adapter weights. Collective."""
    cached = {name: m for name, m in model.named_modules() if isinstance(m, CachedDoRALinear)}
    for name, norm_O in row_norms(cached).items():
        cached[name].norm.copy_(norm_O)


def row_norm_caches(model: Decoder) -> list[str]:
    """Names of the buffers that `refresh` computes."""
    return [f"{name}.norm" for name, module in model.named_modules() if isinstance(module, CachedDoRALinear)]


@contextmanager
def adapters_off(model: Decoder) -> Iterator[None]:
    """Within the context the model computes its base alone, without DoRA's magnitudes."""
    layers = list(adapter_layers(model).values())
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def snapshot(model: Decoder, version: int, compute: torch.dtype | None = None) -> PolicySnapshot:
    """All trained tensors: adapters in the format of `tora.adapters.snapshot`, and full-weight parameters under their
    Hugging Face names. Collective.

    `compute`: the dtype that full-weight parameters are sent in; None for the dtype they are held in.
    """
    layers = adapter_layers(model)
    adapters = gather({f"{hf}/{name}": getattr(m, name) for hf, m in layers.items() for name in m.adapter_params()})
    full = full_weight_parameters(model)
    norms, tensors = row_norms(layers), dict[str, torch.Tensor](full)
    for hf, layer in layers.items():
        parameters = {name: adapters[f"{hf}/{name}"] for name in layer.adapter_params()}
        tensors |= {f"{hf}{suffix}": tensor for suffix, tensor in layer.to_wire(parameters, norms.get(hf)).items()}
    return pack(version, tensors, gather, {} if compute is None else dict.fromkeys(full, compute))


def full_weight_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """Parameters trained directly, not through an adapter, by Hugging Face name."""
    adapter_names = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for parameter in module.adapter_params()
    }
    trained = trained_parameters(model).items()
    return {model.names.parameter_to_hf(name): p for name, p in trained if name not in adapter_names}


def num_trained_modules(model: Decoder) -> int:
    """Number of modules with an adapter or with full-weight parameters."""
    return len(adapter_layers(model)) + len({name.rpartition(".")[0] for name in full_weight_parameters(model)})


@torch.no_grad()
def from_wire(model: Decoder, tensors: Mapping[str, torch.Tensor]) -> int:
    """The inverse of `snapshot`, for a model that is not sharded. Returns the number of modules written.

    Raises ValueError if the tensors do not match the model's trained parameters one to one.
    """
    layers, parameters = adapter_layers(model), full_weight_parameters(model)
    given = {name: t for name, t in tensors.items() if name in parameters or not layers}
    _check_same("trained parameters", parameters, given)
    modules = split_by_module({name: t for name, t in tensors.items() if name not in given})
    _check_same("adapted layers", layers, modules)
    for name, parameter in parameters.items():
        parameter.copy_(given[name])
    for name, layer in layers.items():
        layer.from_wire(modules[name])
    refresh(model)
    return num_trained_modules(model)


def _check_same(what: str, model: Mapping[str, object], snapshot: Mapping[str, object]) -> None:
    odd = sorted(model.keys() ^ snapshot.keys())
    if odd:
        raise ValueError(f"snapshot and model differ in {len(odd)} {what}, e.g. {odd[0]!r}")
