"""Tiny random models of many families, made by transformers: one row each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import make_tokenizer, randomize


@dataclass(frozen=True)
class TinyFamily:
    """What a family's tiny model needs beyond the sizes that all share."""

    prefix: str
    """transformers' classes are `prefix`Config and `prefix`ForCausalLM."""
    overrides: dict[str, Any] = field(default_factory=dict)
    targets: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter."""
    config_class: str | None = None


_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.05 * i for i in range(12)],
    "long_factor": [2.0 + 0.1 * i for i in range(12)],
    "original_max_position_embeddings": 512,
    "factor": 4.0,
    "partial_rotary_factor": 0.75,
}

FAMILIES: dict[str, TinyFamily] = {
    "mistral": TinyFamily("Mistral", {"sliding_window": 16}),
    "gemma2": TinyFamily(
        "Gemma2",
        {**_WINDOWS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 64},
    ),
    "gemma3": TinyFamily("Gemma3", {**_WINDOWS, "query_pre_attn_scalar": 64}, config_class="Gemma3TextConfig"),
    "phi3": TinyFamily("Phi3", {"tie_word_embeddings": False}),
    "phi4-mini": TinyFamily("Phi3", {"rope_parameters": _LONGROPE, "max_position_embeddings": 2048}),
    "smollm3": TinyFamily("SmolLM3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "olmo2": TinyFamily("Olmo2"),
    "granite": TinyFamily(
        "Granite",
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
    "glm4": TinyFamily("Glm4", {"tie_word_embeddings": False}),
    "cohere2": TinyFamily("Cohere2", {**_WINDOWS, "logit_scale": 0.25}),
    "qwen2_moe": TinyFamily("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 64}, _ATTENTION),
    "qwen3_moe": TinyFamily("Qwen3Moe", _EXPERTS, _ATTENTION),
}


def make_family(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes config, weights and tokenizer; returns `folder`."""
    family, tokenizer = FAMILIES[name], make_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = getattr(transformers, family.config_class or f"{family.prefix}Config")(**{**sizes, **family.overrides})
    model = getattr(transformers, f"{family.prefix}ForCausalLM")(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
