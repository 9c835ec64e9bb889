"""What vLLM 0.32 cannot serve of a model that transformers' code trains, by name and reason, before anything loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tora.adapters.targets import target_leaves
from tora.config.rules import check
from tora.config.schema import RunConfig
from tora.errors import ConfigError
from tora.models.load import implementation_of, read_config
from tora.models.vision.generic import SEES_WHOLE_IMAGES


def with_served_model(cfg: RunConfig, wanted: str) -> RunConfig:
    """`cfg` with the torch engine where `rollout.engine` was `auto` and vLLM cannot serve the model. `wanted`: the
    engine before `with_engine`.

    Raises ConfigError if vLLM was asked for by name, or the run cannot have the torch engine.
    """
    if cfg.rollout.engine != "vllm" or (gap := vllm_gap(cfg)) is None:
        return cfg
    if wanted != "auto":
        raise ConfigError(f"{gap}: it needs rollout.engine=torch.")
    cfg = replace(cfg, rollout=replace(cfg.rollout, engine="torch"))
    check(cfg)
    return cfg


def vllm_gap(cfg: RunConfig) -> str | None:
    """Why vLLM cannot serve the model as the learner has it; None if nothing speaks against it."""
    config = read_config(Path(cfg.model.path))
    if implementation_of(config, cfg.model.implementation) == "native":
        return None
    takes_images, on_gpu = hasattr(config, "vision_config"), torch.cuda.is_available()
    if takes_images and cfg.model.train_vision == "lora":
        return f"vLLM serves no adapter in the vision tower of a {config.model_type!r} model (model.train_vision=lora)"
    if "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        return _linear_attention_gap(cfg, config.model_type, on_gpu=on_gpu)
    if takes_images and config.model_type in SEES_WHOLE_IMAGES and not on_gpu:
        return (
            f"the features of an image see each other in a {config.model_type!r} model, which vLLM's attention on a "
            "CPU does not allow"
        )
    return None


_FUSED = ("in_proj_qkv", "in_proj_z")
"""One layer of four parts in vLLM, where Tora's slots have one part for each module."""


_TRIED = ("qwen3_5", "qwen3_5_text", "qwen3_next")


def _linear_attention_gap(cfg: RunConfig, model_type: str, *, on_gpu: bool) -> str | None:
    if model_type not in _TRIED:
        return f"Tora has not been tried with vLLM's layers that carry a state, as a {model_type!r} model has them"
    if not on_gpu:
        return f"vLLM's linear attention, as a {model_type!r} model has it, computes in bf16 alone on a CPU"
    adapted = [] if cfg.model.lora_type == "full" else [leaf for leaf in target_leaves(cfg.model) if leaf in _FUSED]
    if adapted:
        return (
            f"vLLM has the projections of a {model_type!r} model's linear attention in one layer, in which Tora has no "
            f"place for adapters on {' and '.join(adapted)} (model.lora_targets)"
        )
    return None
