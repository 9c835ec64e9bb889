"""Which linear layers get an adapter, and of which rank and scaling: from a config, or from a PEFT folder."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tora.adapters.peft_config import PeftConfig, by_pattern, matches
from tora.config.schema import ModelConfig
from tora.errors import ConfigError
from tora.models.base import Decoder
from tora.models.load import empty_decoder


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """The size of one layer's adapter."""

    rank: int
    scaling: float
    """The factor s of B A."""


def scaling_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor s of B A: alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def alpha_of(rank: int, scaling: float, use_rslora: bool) -> float:
    """The inverse of `scaling_of`, to 12 digits."""
    return float(f"{scaling * (math.sqrt(rank) if use_rslora else rank):.12g}")


def adapter_shapes(model: Decoder, cfg: ModelConfig, start: PeftConfig | None = None) -> dict[str, AdapterShape]:
    """The shape of each adapter that the config asks for, by our module name: the decoder's layers that `lora_targets`
    selects, and with `train_vision=lora` all linear layers of the vision tower and its mergers.

    `start`: the config of `adapter_path`, whose patterns give single layers another rank or alpha.
    Raises ConfigError if a target matches no layer.
    """
    decoder = {name: model.names.module_to_hf(name) for name in model.adaptable()}
    _check_targets(cfg.lora_targets, decoder.values())
    chosen = {name: hf for name, hf in decoder.items() if matches(cfg.lora_targets, hf)}
    if cfg.train_vision == "lora":
        within = tuple(f"{name}." for name in model.towers)
        tower = [n for n, m in model.named_modules() if n.startswith(within) and type(m) is nn.Linear]
        chosen |= {name: model.names.module_to_hf(name) for name in tower}
    return {name: _shape(hf, cfg, start) for name, hf in chosen.items()}


def target_leaves(cfg: ModelConfig) -> tuple[str, ...]:
    """Last names of the decoder's linear layers that may get an adapter: for engines, which know them by these.

    Raises ConfigError if the model is not supported.
    """
    if not isinstance(cfg.lora_targets, str):
        return tuple(dict.fromkeys(target.rpartition(".")[2] for target in cfg.lora_targets))
    model = empty_decoder(
        Path(cfg.path), dtype=torch.float32, device=torch.device("cpu"), implementation=cfg.implementation
    )
    names = [model.names.module_to_hf(name) for name in model.adaptable()]
    chosen = [name for name in names if matches(cfg.lora_targets, name)]
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in chosen))


def _shape(hf_name: str, cfg: ModelConfig, start: PeftConfig | None) -> AdapterShape:
    ranks, alphas = (start.rank_pattern, start.alpha_pattern) if start else ({}, {})
    rank = int(by_pattern(ranks, hf_name, cfg.lora_rank))
    return AdapterShape(rank, scaling_of(rank, by_pattern(alphas, hf_name, cfg.lora_alpha), cfg.use_rslora))


def _check_targets(targets: str | Sequence[str], names: Iterable[str]) -> None:
    """Raises ConfigError if a target matches none of the decoder's linear layers."""
    names = list(names)
    if isinstance(targets, str):
        if not any(matches(targets, name) for name in names):
            raise ConfigError(f"model.lora_targets={targets} matches no linear layer, such as {names[0]}, as a whole.")
        return
    for target in targets:
        if not any(matches([target], name) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(target, known, 1, cutoff=0) or known
            raise ConfigError(f"model.lora_targets: {target!r} matches no linear layer; the nearest is {near[0]!r}")
