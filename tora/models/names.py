"""Hugging Face's parameter names <-> torchtune's. A table, applied to whole dotted names."""

from __future__ import annotations

import re

_MODULES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
}
_TO_HF = {ours: theirs for theirs, ours in _MODULES.items()}


def module_from_hf(name: str) -> str | None:
    """`model.layers.3.mlp.up_proj` -> `layers.3.mlp.w3`; None for a name outside the table."""
    match = re.fullmatch(r"model\.(layers\.\d+)\.(.+)", name)
    prefix, leaf = (f"{match[1]}.", match[2]) if match else ("", name)
    return prefix + _MODULES[leaf] if leaf in _MODULES else None


def module_to_hf(name: str) -> str:
    """`layers.3.mlp.w3` -> `model.layers.3.mlp.up_proj`."""
    match = re.fullmatch(r"(layers\.\d+)\.(.+)", name)
    return f"model.{match[1]}.{_TO_HF[match[2]]}" if match else _TO_HF[name]


def parameter_from_hf(name: str) -> str | None:
    """`model.norm.weight` -> `norm.scale`; None for a name outside the table."""
    module, _, leaf = name.rpartition(".")
    ours = module_from_hf(module)
    if ours is None:
        return None
    return f"{ours}.{'scale' if ours.endswith('norm') and leaf == 'weight' else leaf}"


def parameter_to_hf(name: str) -> str:
    """`norm.scale` -> `model.norm.weight`."""
    module, _, leaf = name.rpartition(".")
    return f"{module_to_hf(module)}.{'weight' if leaf == 'scale' else leaf}"
