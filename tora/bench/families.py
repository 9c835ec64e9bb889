"""Tiny random models of many families, made by transformers: one row each. Tests and `tora.bench.models` share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class TinyFamily:
    """What a family's tiny model needs beyond the sizes that all share."""

    title: str
    """Its name in `docs/models.md`."""
    prefix: str
    """transformers' classes are `prefix`Config and `prefix`ForCausalLM."""
    overrides: dict[str, Any] = field(default_factory=dict)
    config_class: str | None = None
    """Where it is not `prefix`Config."""


_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
"""A layer that carries a state, and one of attention."""
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
_CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 64}
_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.05 * i for i in range(12)],
        "long_factor": [2.0 + 0.1 * i for i in range(12)],
        "partial_rotary_factor": 0.75,
    },
    "original_max_position_embeddings": 512,
    "max_position_embeddings": 2048,
}
_MULTIPLIERS = {
    "logits_scaling": 4.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
}

FAMILIES: dict[str, TinyFamily] = {
    "mistral": TinyFamily("Mistral", "Mistral", {"sliding_window": 16}),
    "gemma2": TinyFamily("Gemma 2", "Gemma2", {**_WINDOWS, **_CAPPED}),
    "gemma3": TinyFamily(
        "Gemma 3, text", "Gemma3", {**_WINDOWS, "query_pre_attn_scalar": 64}, config_class="Gemma3TextConfig"
    ),
    "phi3": TinyFamily("Phi-3", "Phi3", {"tie_word_embeddings": False}),
    "phi4-mini": TinyFamily("Phi-4-mini", "Phi3", _LONGROPE),
    "smollm3": TinyFamily("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "olmo2": TinyFamily("OLMo 2", "Olmo2"),
    "granite": TinyFamily("Granite", "Granite", _MULTIPLIERS),
    "glm4": TinyFamily("GLM-4", "Glm4", {"tie_word_embeddings": False}),
    "cohere2": TinyFamily("Cohere 2", "Cohere2", {**_WINDOWS, "logit_scale": 0.25}),
    "qwen3_5": TinyFamily("Qwen3.5, text", "Qwen3_5", LINEAR_ATTENTION, config_class="Qwen3_5TextConfig"),
    "qwen2_moe": TinyFamily("Qwen2-MoE", "Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": TinyFamily("Qwen3-MoE", "Qwen3Moe", _EXPERTS),
}


SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
"""Of every tiny decoder, also of one with a vision tower."""


def write_family(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Path:
    """Write a model's config and weights, and return its folder: two layers, 320 tokens, no tokenizer. `more` goes to
    the config."""
    import transformers

    family = FAMILIES[name]
    sizes: dict[str, Any] = {
        **SIZES,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    config = getattr(transformers, family.config_class or f"{family.prefix}Config")(
        **{**sizes, **family.overrides, **more}
    )
    model = getattr(transformers, f"{family.prefix}ForCausalLM")(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder)
    return folder


def byte_tokenizer(special: Sequence[str], **settings: Any) -> Any:
    """One token per byte after the special tokens. `settings` go to transformers' tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough to make logits differ, and biases and norm scales that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15, generator=generator)
            elif name.endswith("A_log"):  # a state that lasts some tokens
                parameter.uniform_(-3, 0, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=generator)
            else:  # scales of 1 would hide a norm in the wrong place
                parameter.uniform_(0.5, 1.5, generator=generator)
