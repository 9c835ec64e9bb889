"""Read and write PEFT's folder format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tora.adapters.inject import adapter_layers, full_weight_parameters, refresh
from tora.adapters.peft_config import CONFIG_FILE, PeftConfig, read_peft_config
from tora.adapters.targets import alpha_of
from tora.config.schema import ModelConfig
from tora.distributed.sharding import copy_full
from tora.errors import ConfigError
from tora.models.base import Decoder
from tora.models.decoder import NativeDecoder
from tora.models.hub import named
from tora.models.weight_files import open_weights

_PREFIX = "base_model.model."
_SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
TOWER_LINEARS = ("attn.qkv", "attn.proj", "linear_fc1", "linear_fc2")
"""PEFT targets that match exactly the linear layers of a vision tower and its mergers. A bare `proj` would match the
patch embedding too, a convolution."""
_WEIGHTS = "adapter_model.safetensors"
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
"""What torch.compile, FSDP, checkpointing and DDP put into names; some trainers save them."""
_ADAPTER_NAME = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.(?!weight$)[^.]+(?=\.weight$|$)")


def peft_tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """Our parameters by PEFT's tensor names; they may be sharded."""
    adapters = {
        f"{_PREFIX}{module}.{_SUFFIX[name]}": getattr(layer, name)
        for module, layer in adapter_layers(model).items()
        for name in layer.adapter_params()
    }
    return {**adapters, **{f"{_PREFIX}{name}": p for name, p in full_weight_parameters(model).items()}}


def peft_config(model: Decoder, cfg: ModelConfig) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    layers = adapter_layers(model)
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: alpha_of(layer.rank, layer.scaling, cfg.use_rslora) for name, layer in layers.items()}
    others = {name: alpha for name, alpha in alphas.items() if not math.isclose(alpha, cfg.lora_alpha)}
    base = named(cfg)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "revision": base.revision,
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != cfg.lora_rank},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in others.items()},
        "use_rslora": cfg.use_rslora,
        "use_dora": cfg.lora_type != "lora",
        **_targets(model, cfg),
        "modules_to_save": tower_modules(model) if cfg.train_vision == "full" else None,
        "lora_dropout": cfg.lora_dropout,
        "bias": "none",
        "inference_mode": True,
    }


def tower_modules(model: Decoder) -> list[str]:
    """Last names of the modules that make features of images."""
    return [name.rpartition(".")[2] for name in model.towers]


def _targets(model: Decoder, cfg: ModelConfig) -> dict[str, Any]:
    """PEFT's fields that select the layers which carry an adapter, and no others of these names in a tower."""
    own = isinstance(model, NativeDecoder)
    if isinstance(cfg.lora_targets, str) or (cfg.train_vision == "lora" and not own):
        return {"target_modules": list(adapter_layers(model))}
    if own or not model.towers:
        return {"target_modules": [*cfg.lora_targets, *(TOWER_LINEARS if cfg.train_vision == "lora" else ())]}
    outside = rf".*\.({'|'.join(tower_modules(model))})\..*"
    return {"target_modules": [*cfg.lora_targets], "exclude_modules": outside}


def save_peft(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Write a PEFT folder. `tensors` are those of `peft_tensors`, gathered; `config` is that of `peft_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: p.detach().cpu().contiguous() for name, p in tensors.items()}
    save_file(plain, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_peft(model: Decoder, cfg: ModelConfig, folder: Path) -> None:
    """Load a PEFT adapter into the model's adapters, whose shapes `adapter_shapes` has taken from the same folder.

    Afterwards the model computes what PEFT does with that folder. Raises ConfigError if the folder holds no adapter,
    one of another type, rank, scaling or set of modules, or one that Tora would compute otherwise.
    """
    theirs = read_peft_config(folder)
    _check_settings(theirs, model, cfg, folder)
    parameters, tensors = peft_tensors(model), _read_tensors(folder)
    _check_modules(theirs, model, parameters, tensors, folder)
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if parameter.shape != tensor.shape:
            raise ConfigError(
                f"adapter tensor {name!r} in {str(folder)!r} has shape {tuple(tensor.shape)}, and its rank and layer "
                f"ask for {tuple(parameter.shape)}"
            )
        if not tensor.isfinite().all():
            raise ConfigError(f"adapter tensor {name!r} in {str(folder)!r} holds values that are not finite")
        copy_full(parameter, tensor)
    refresh(model)


def _check_settings(theirs: PeftConfig, model: Decoder, cfg: ModelConfig, folder: Path) -> None:
    ours = {
        "r": ("model.lora_rank", theirs.r, cfg.lora_rank),
        "lora_alpha": ("model.lora_alpha", theirs.lora_alpha, cfg.lora_alpha),
        "use_rslora": ("model.use_rslora", theirs.use_rslora, cfg.use_rslora),
        "use_dora": ("model.lora_type", theirs.use_dora, cfg.lora_type != "lora"),
    }
    for field, (key, their_value, our_value) in ours.items():
        if their_value != our_value:
            raise ConfigError(
                f"the adapter in {str(folder)!r} has {field}={their_value}, and {key} makes it {our_value} in this run"
            )
    expected = tower_modules(model) if cfg.train_vision == "full" else []
    if sorted(theirs.modules_to_save) != sorted(expected):
        raise ConfigError(
            f"the adapter in {str(folder)!r} has modules_to_save={list(theirs.modules_to_save)}, and a run with "
            f"model.train_vision={cfg.train_vision} starts from {expected} alone"
        )


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors by the names of `peft_tensors`, without what wrappers and adapter names add to them."""
    if not (folder / _WEIGHTS).is_file():
        remedy = ""
        if (folder / "adapter_model.bin").is_file():
            remedy = "; PEFT reads its adapter_model.bin, and `save_pretrained` of what it loads writes that file"
        raise ConfigError(f"model.adapter_path {str(folder)!r} holds no {_WEIGHTS}; other formats are not read{remedy}")
    tensors: dict[str, torch.Tensor] = {}
    with open_weights(folder / _WEIGHTS) as file:
        held = {stored: file.get_tensor(stored) for stored in file.keys()}  # noqa: SIM118  (a handle is not iterable)
    for stored, tensor in held.items():
        name = _ADAPTER_NAME.sub(r".\1", _WRAPPERS.sub("", stored))
        name = name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name
        name = name if name.startswith(_PREFIX) else f"{_PREFIX}{name}"
        if name in tensors:
            raise ConfigError(f"the adapter in {str(folder)!r} holds {name!r} twice")
        tensors[name] = tensor
    return tensors


def _check_modules(
    theirs: PeftConfig,
    model: Decoder,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
) -> None:
    """Raises ConfigError unless the folder's tensors are the model's, and its config gives each module an adapter."""
    if odd := sorted(parameters.keys() ^ tensors.keys()):
        owner = "the adapter" if odd[0] in tensors else "this run"
        raise ConfigError(
            f"the adapter in {str(folder)!r} and model.lora_targets differ in {len(odd)} tensors, e.g. {odd[0]!r}, "
            f"which only {owner} has"
        )
    for module in adapter_layers(model):
        if not theirs.adapts(module):
            raise ConfigError(
                f"the adapter in {str(folder)!r} has tensors for {module}, which its own target_modules leave out"
            )
