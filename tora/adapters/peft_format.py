"""Read and write PEFT's folder format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tora.adapters.inject import adapter_layers, full_weight_parameters, refresh
from tora.config.schema import ModelConfig
from tora.distributed.sharding import copy_full
from tora.errors import ConfigError
from tora.models.decoder import Decoder

_PREFIX = "base_model.model."
_SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_TOWER_LINEARS = ("attn.qkv", "attn.proj", "linear_fc1", "linear_fc2")
"""PEFT targets that match exactly the linear layers of a vision tower and its mergers. A bare `proj` would match the
patch embedding too, a convolution."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """Our parameters by PEFT's tensor names; they may be sharded."""
    adapters = {
        f"{_PREFIX}{module}.{_SUFFIX[name]}": getattr(layer, name)
        for module, layer in adapter_layers(model).items()
        for name in layer.adapter_params()
    }
    return {**adapters, **{f"{_PREFIX}{name}": p for name, p in full_weight_parameters(model).items()}}


def peft_config(cfg: ModelConfig) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    tower = _TOWER_LINEARS if cfg.train_vision == "lora" else ()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cfg.path,
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "use_rslora": cfg.use_rslora,
        "use_dora": cfg.lora_type != "lora",
        "target_modules": [*cfg.lora_targets, *tower],
        "modules_to_save": ["visual"] if cfg.train_vision == "full" else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def save_peft(tensors: Mapping[str, torch.Tensor], cfg: ModelConfig, folder: Path) -> None:
    """Write a PEFT folder. `tensors` are those of `peft_tensors`, gathered."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: p.detach().cpu().contiguous() for name, p in tensors.items()}
    save_file(plain, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(peft_config(cfg), indent=2) + "\n")


@torch.no_grad()
def load_peft(model: Decoder, cfg: ModelConfig, folder: Path) -> None:
    """Load a PEFT adapter into the model's adapters.

    Raises ConfigError if the folder holds none, or one of another type, rank, scaling or set of modules.
    """
    if not (folder / _CONFIG).is_file():
        raise ConfigError(f"model.adapter_path {str(folder)!r} holds no {_CONFIG}")
    theirs = json.loads((folder / _CONFIG).read_text())
    ours = peft_config(cfg)
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora"):
        if theirs.get(key, False) != ours[key]:
            raise ConfigError(
                f"the adapter in {str(folder)!r} has {key}={theirs.get(key)!r}, this run has {ours[key]!r}"
            )
    parameters, tensors = peft_tensors(model), load_file(folder / _WEIGHTS)
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise ConfigError(
            f"the adapter in {str(folder)!r} and model.lora_targets differ in {len(odd)} tensors, e.g. {odd[0]!r}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ConfigError(
                f"adapter tensor {name!r} has shape {tuple(tensors[name].shape)}, the model's {tuple(parameter.shape)}"
            )
        copy_full(parameter, tensors[name])
    refresh(model)
