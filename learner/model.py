"""The policy that a config describes: base from its folder, adapters injected, a starting adapter loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from tora.adapters.inject import inject, scaling_of
from tora.adapters.peft_format import load_peft
from tora.config import RunConfig
from tora.errors import ConfigError
from tora.models.decoder import Decoder
from tora.models.load import load_decoder
from tora.models.quantize import check_shards
from tora.models.qwen3_vl import Qwen3VL

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def device_of(cfg: RunConfig, local_rank: int = 0) -> torch.device:
    """`auto` is the GPU where there is one; each rank of a machine has its own."""
    kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)


def build_policy(cfg: RunConfig, device: torch.device) -> Decoder:
    """Trained parameters, and only they, require gradients. The adapters' start follows from `cfg.seed`."""
    torch.manual_seed(cfg.seed)
    model = load_decoder(
        Path(cfg.model.path), dtype=DTYPES[cfg.dtype], device=device, quantize_base=cfg.model.quantize_base
    )
    check_shards(model, cfg.learner_ranks)
    tower = model.visual if isinstance(model, Qwen3VL) else None
    if tower is None and cfg.model.train_vision != "none":
        raise ConfigError(
            f"model.train_vision={cfg.model.train_vision}, but the model in {cfg.model.path!r} has no vision tower"
        )
    if cfg.model.lora_type == "full":
        model.requires_grad_(True)
    else:
        inject(
            model,
            cfg.model.lora_type,
            rank=cfg.model.lora_rank,
            scaling=scaling_of(cfg.model.lora_rank, cfg.model.lora_alpha, cfg.model.use_rslora),
            targets=cfg.model.lora_targets,
            tower=cfg.model.train_vision == "lora",
        )
    if tower is not None and cfg.model.train_vision != "lora":
        tower.requires_grad_(cfg.model.train_vision == "full")
    if cfg.model.adapter_path:
        load_peft(model, cfg.model, Path(cfg.model.adapter_path))
    return model
