"""Build a model of transformers on the meta device, and its buffers on a device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tora.errors import ConfigError, first_line
from tora.models.generic import NAME, GenericDecoder, attention
from tora.models.generic_support import check_config
from tora.models.vision.generic import GenericVision


def build_generic(config: Any, linear: type[nn.Linear] = nn.Linear) -> GenericDecoder:
    """A model with parameters and buffers on the meta device; `compute_buffers` makes the buffers.

    `config`: transformers' config object. `linear`: the class of the decoder layers' linear modules, not of the head.
    Raises ConfigError if transformers has no such model, or one that `generic_support` refuses.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText

    check_config(config)
    AttentionInterface.register(NAME, attention)
    takes_images = hasattr(config, "vision_config")
    auto, ours = (
        (AutoModelForImageTextToText, GenericVision) if takes_images else (AutoModelForCausalLM, GenericDecoder)
    )
    try:
        with torch.device("meta"):
            hf = auto.from_config(config, attn_implementation=ours.attention_settings(NAME), dtype=torch.float32)
        model = ours(hf)
    except ConfigError:
        raise
    except Exception as error:  # of many kinds, for a model that is built in a way of its own
        raise ConfigError(f"a {config.model_type!r} model cannot be trained: {first_line(error)}") from error
    for name in model.adaptable():
        model.get_submodule(name).__class__ = linear
    return model


_KEPT = (".A_log",)
"""Logarithms of decays of a state: files and vLLM have them in float32, and bf16 would change a decay by 1 %."""


def cast_parameters(model: GenericDecoder, dtype: torch.dtype) -> None:
    """Give parameters, which are on the meta device, the dtype that transformers would load them in; to decays
    float32."""
    kept = (*(getattr(model.hf, "_keep_in_fp32_modules_strict", None) or ()), *_KEPT)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not any(part in f"{module_name}.{name}" for part in kept):
                setattr(module, name, nn.Parameter(parameter.to(dtype), parameter.requires_grad))


@torch.no_grad()
def compute_buffers(model: GenericDecoder, device: torch.device) -> None:
    """Compute all buffers, such as rotary frequencies, on `device` by the model's own code. They stay in float32.

    Raises ConfigError if the model has buffers that it does not compute.
    """
    from transformers import PreTrainedModel

    owners = {n: m for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    for name, module in model.named_modules():
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if b.is_meta}
        if not buffers:
            continue
        for leaf, buffer in buffers.items():
            fill = math.nan if buffer.is_floating_point() else 0
            module._buffers[leaf] = torch.full_like(buffer, fill, device=device)
        owner = max((n for n in owners if n == name or name.startswith(f"{n}.")), key=len)
        owners[owner]._init_weights(module)
        for leaf in buffers:
            if leaf not in module._non_persistent_buffers_set or not module._buffers[leaf].isfinite().all():  # pyright: ignore[reportOptionalMemberAccess]
                raise ConfigError(
                    f"{type(model.hf).__name__} cannot be trained: its buffer {model.names.module_to_hf(name)}.{leaf} "
                    "is not a function of its config"
                )
