"""A Hugging Face folder -> a decoder with its weights, streamed from safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tora.errors import ConfigError
from tora.models.decoder import Decoder, RotaryTable, build_decoder
from tora.models.family import families
from tora.models.names import parameter_from_hf


def read_config(folder: Path) -> Any:
    """transformers' config object; ConfigError where the folder holds none or an unsupported family."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path {str(folder)!r} holds no config.json; `tune download` fetches a model")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in families():
        raise ConfigError(
            f"model_type {config.model_type!r} of {str(folder)!r} is not supported; {', '.join(families())} are"
        )
    return config


def shard_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, by its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ConfigError(f"model.path {str(folder)!r} holds no safetensors file; other formats are not read")


def stream_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor on the CPU), one at a time."""
    for file in shard_files(folder):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                yield name, shard.get_tensor(name)


def load_weights(model: nn.Module, folder: Path, *, tied: bool) -> None:
    """Copy every tensor of the folder into the model, casting to its dtypes.

    Errors: ConfigError for a tensor without a place, of another shape, or missing.
    """
    places = dict(model.named_parameters())
    missing = {name for name in places if ".lora_" not in name and not name.endswith(".magnitude")}
    for hf_name, tensor in stream_tensors(folder):
        if hf_name.endswith("rotary_emb.inv_freq") or (tied and hf_name == "lm_head.weight"):
            continue
        name = parameter_from_hf(hf_name)
        if name is None or name not in places:
            raise ConfigError(
                f"tensor {hf_name!r} of {str(folder)!r} has no place in the model that config.json describes"
            )
        if places[name].shape != tensor.shape:
            raise ConfigError(
                f"tensor {hf_name!r} of {str(folder)!r} has shape {tuple(tensor.shape)}, "
                f"config.json asks for {tuple(places[name].shape)}"
            )
        with torch.no_grad():
            places[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise ConfigError(f"{str(folder)!r} lacks {len(missing)} tensors of its model, e.g. {sorted(missing)[0]!r}")


def load_decoder(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Build on the meta device, allocate once, stream the weights in. All parameters frozen."""
    config = read_config(folder)
    with torch.device("meta"):
        model = build_decoder(config, families()[config.model_type])
    model = model.to(dtype).to_empty(device=device)
    for module in model.modules():
        if isinstance(module, RotaryTable):
            with torch.device(device):
                module.reset()
    load_weights(model, folder, tied=config.tie_word_embeddings)
    return model.requires_grad_(False)
