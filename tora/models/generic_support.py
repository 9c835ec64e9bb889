"""What the generic path knows of transformers' models: what it cannot run, and what they do to their logits."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import nn

from tora.errors import ConfigError
from tora.models.head import LogitMap

_RECURRENT = "linear_attention"
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", _RECURRENT})
_ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
"""Last names of the linear layers that choose experts. They get no adapter: their choices would differ by rounding
between learner and engine."""


def is_router(name: str) -> bool:
    return _ROUTERS.search(name) is not None


def why_not(config: Any) -> str | None:
    """Why the generic path cannot run a model of this config; None if nothing speaks against it."""
    text = config.get_text_config()
    if getattr(config, "auto_map", None):
        return "it needs code from its own folder, which Tora does not run"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised; use the original ones, with model.quantize_base=true for NF4"
    odd = sorted({kind for kind in getattr(text, "layer_types", None) or [] if kind not in _LAYER_TYPES})
    if odd:
        return f"it has layers of type {odd[0]!r}; only attention and linear attention can be packed"
    if getattr(text, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    return None


def check_config(config: Any) -> None:
    """Raises ConfigError if `why_not` gives a reason."""
    if reason := why_not(config):
        raise ConfigError(f"a {config.model_type!r} model cannot be trained: {reason}")


def check_class(hf: Any) -> None:
    """Raises ConfigError unless the model's attention can be replaced and its layers are found."""
    name = type(hf).__name__
    if not _looks_attention_up(type(hf)):
        raise ConfigError(f"{name} cannot be trained: transformers does not let its attention be replaced")
    if not hasattr(hf.get_decoder(), "layers"):
        raise ConfigError(f"{name} cannot be trained: its decoder has no `layers`")
    if any("sinks" in parameter for parameter, _ in hf.named_parameters()):
        raise ConfigError(f"{name} cannot be trained: its attention has sinks")


def _looks_attention_up(kind: type[nn.Module]) -> bool:
    """Whether a class of transformers takes its attention from the registry. Some, such as Qwen3.5's, do so without
    the flag that says it."""
    if getattr(kind, "_supports_attention_backend", False):
        return True
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(sys.modules[kind.__module__])


def recurrent_part(hf: Any, index: int, layer: nn.Module) -> Any:
    """The part of a decoder layer that carries a state along the sequence; None in a layer of attention.

    Raises ConfigError if the layer keeps its state otherwise than in the cache that Tora gives it.
    """
    kinds = getattr(hf.config.get_text_config(), "layer_types", None) or []
    if index >= len(kinds) or kinds[index] != _RECURRENT:
        return None
    parts = [
        m for m in layer.modules() if {"cache_params", "attention_mask"} <= {*inspect.signature(m.forward).parameters}
    ]
    if len(parts) != 1:
        raise ConfigError(
            f"{type(hf).__name__} cannot be trained: its layers of type {kinds[index]!r} have no part that takes "
            "`cache_params` and a mask, as those of transformers that can be packed do"
        )
    return parts[0]


def head_map(hf: Any) -> LogitMap:
    """What the model's own forward does to the head's product.

    The config says it under the names that transformers' models use, and the forward itself is the judge: it runs
    on the meta model's code with given hidden states in place of the decoder's, and no head. Raises ConfigError if
    the two differ.
    """
    check_class(hf)
    text = hf.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    known = LogitMap(scale, getattr(text, "final_logit_softcapping", None))
    x = torch.linspace(-40.0, 40.0, 16)[None, :, None]
    found = _own_map(hf, x)
    if found.shape != x.shape or not torch.allclose(found, known(x.clone()), rtol=1e-5, atol=1e-5):
        raise ConfigError(
            f"{type(hf).__name__} cannot be trained: it does more to its logits than scaling and soft-capping"
        )
    return known


class _Given(nn.Module):
    """Stands for a decoder whose last hidden states are given."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.outputs = _Outputs(hidden)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.outputs


class _Outputs:
    """A decoder's outputs, of which all but the hidden states are missing."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        assert index == 0
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _own_map(hf: Any, x: torch.Tensor) -> torch.Tensor:
    """The logits of the model's own forward where its head's product is `x`."""
    base = hf.base_model_prefix
    decoder, head = getattr(hf, base), hf.get_output_embeddings()
    try:
        setattr(hf, base, _Given(x))
        hf.set_output_embeddings(nn.Identity())
        return hf(input_ids=torch.zeros(x.shape[:2], dtype=torch.int64)).logits
    finally:
        setattr(hf, base, decoder)
        hf.set_output_embeddings(head)
