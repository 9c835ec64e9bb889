"""Build the policy a config describes: load the base, inject adapters, load a starting adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tora.adapters.inject import full_weight_parameters, inject, reset_adapters
from tora.adapters.peft_config import read_peft_config
from tora.adapters.peft_format import load_peft
from tora.adapters.targets import adapter_shapes
from tora.config.schema import RunConfig
from tora.errors import ConfigError
from tora.models.base import Decoder
from tora.models.generic import GenericDecoder
from tora.models.length import fix_rotary, longest_sequence
from tora.models.load import empty_decoder, fill_decoder
from tora.models.proof import prove
from tora.models.quantize import check_shards
from tora.models.vision.processor import ImageProcessor, has_image_processor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def trains_full_weights(cfg: RunConfig) -> bool:
    """Whether any parameter of the model itself is trained, rather than an adapter."""
    return cfg.model.trains_whole


def empty_policy(cfg: RunConfig, device: torch.device, *, masters: bool = False) -> Decoder:
    """The model with its adapters, on the meta device. Exactly the trained parameters require gradients. It is not in
    training mode, so its adapters' inputs are not dropped.

    `masters`: hold full-weight parameters in float32 whatever `cfg.dtype` is; `fsdp.sharder` casts them for the
    forward pass.

    Raises ConfigError if the model is not supported, a LoRA target matches no layer, the folder of `adapter_path` holds
    an adapter that Tora does not support, or `train_vision` is set for a
    model without a vision tower.
    """
    model = empty_decoder(
        Path(cfg.model.path),
        dtype=DTYPES[cfg.dtype],
        device=device,
        quantize_base=cfg.model.quantize_base,
        implementation=cfg.model.implementation,
    )
    if not model.towers and cfg.model.train_vision != "none":
        raise ConfigError(
            f"model.train_vision={cfg.model.train_vision}, but the model in {cfg.model.path!r} has no vision tower"
        )
    if isinstance(model, GenericDecoder):
        fix_rotary(model.hf, longest_sequence(cfg), vllm=cfg.rollout.engine == "vllm")
    if gap := model.gap(full=cfg.model.lora_type == "full", quantize=cfg.model.quantize_base):
        raise ConfigError(gap)
    if cfg.model.lora_type == "full":
        model.requires_grad_(True)
    else:
        start = read_peft_config(Path(cfg.model.adapter_path)) if cfg.model.adapter_path else None
        shapes = adapter_shapes(model, cfg.model, start)
        inject(model, cfg.model.lora_type, shapes, dropout=cfg.model.lora_dropout)
    if cfg.model.train_vision != "lora":
        for name in model.towers:
            model.get_submodule(name).requires_grad_(cfg.model.train_vision == "full")
    model.lm_head_fp32 = device.type == "cuda" if cfg.lm_head_fp32 is None else cfg.lm_head_fp32
    if masters:
        for name in full_weight_parameters(model):
            _to_float32(model, model.names.parameter_from_hf(name))
    return model.eval()


def _to_float32(model: Decoder, name: str | None) -> None:
    assert name is not None
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf), dtype=torch.float32)))


def fill_policy(
    model: Decoder, cfg: RunConfig, device: torch.device, shard: Callable[[nn.Module], None] = lambda unit: None
) -> None:
    """Load the base's weights, and initialise new adapters from `cfg.seed`.

    `shard` is called with each layer once its weights are loaded, and finally with the model. Raises ConfigError if
    the base does not fit the config.
    """
    torch.manual_seed(cfg.seed)

    def on_loaded(unit: nn.Module) -> None:
        check_shards(model, cfg.learner_ranks)  # other units are sharded already, or still on the meta device
        reset_adapters(unit)
        shard(unit)

    fill_decoder(model, Path(cfg.model.path), device=device, quantize_base=cfg.model.quantize_base, on_loaded=on_loaded)


def check_policy(model: Decoder, cfg: RunConfig, device: torch.device) -> None:
    """Raises ConfigError if a loaded model does not compute what its class in transformers does. Collective."""
    if isinstance(model, GenericDecoder):
        folder = Path(cfg.model.path)
        prove(model, device, partial(ImageProcessor, folder) if has_image_processor(folder) else None)


def load_adapter(model: Decoder, cfg: RunConfig) -> None:
    """Load `model.adapter_path`, if there is one, into the adapters. Collective. Raises ConfigError if it does not fit
    the config."""
    if cfg.model.adapter_path:
        load_peft(model, cfg.model, Path(cfg.model.adapter_path))


def build_policy(cfg: RunConfig, device: torch.device) -> Decoder:
    """`empty_policy`, `fill_policy` and `load_adapter` in one: an unsharded policy on `device`."""
    model = empty_policy(cfg, device)
    fill_policy(model, cfg, device)
    check_policy(model, cfg, device)
    load_adapter(model, cfg)
    return model
