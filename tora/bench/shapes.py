"""The shapes of known models, as their config.json gives them, and folders of random weights in those shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tora.errors import ConfigError, nearest

_COLUMNS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_QWEN2: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "rope_theta": 1e6}
_QWEN3: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151936, "rope_theta": 1e6, "head_dim": 128}
_LLAMA3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5}

_TABLE: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int], bool]] = {
    # name: family, columns, tied
    "tiny": ({**_QWEN3, "vocab_size": 4096, "head_dim": 64}, (256, 768, 2, 4, 2), True),
    "small": ({**_QWEN3, "vocab_size": 8192, "head_dim": 64}, (1024, 3072, 4, 16, 8), True),
    "qwen2_5/0.5B": (_QWEN2, (896, 4864, 24, 14, 2), True),
    "qwen2_5/1.5B": (_QWEN2, (1536, 8960, 28, 12, 2), True),
    "qwen2_5/3B": (_QWEN2, (2048, 11008, 36, 16, 2), True),
    "qwen2_5/7B": ({**_QWEN2, "vocab_size": 152064}, (3584, 18944, 28, 28, 4), False),
    "qwen2_5/14B": ({**_QWEN2, "vocab_size": 152064}, (5120, 13824, 48, 40, 8), False),
    "qwen2_5/32B": ({**_QWEN2, "vocab_size": 152064}, (5120, 27648, 64, 40, 8), False),
    "qwen3/0.6B": (_QWEN3, (1024, 3072, 28, 16, 8), True),
    "qwen3/1.7B": (_QWEN3, (2048, 6144, 28, 16, 8), True),
    "qwen3/4B": (_QWEN3, (2560, 9728, 36, 32, 8), True),
    "qwen3/8B": (_QWEN3, (4096, 12288, 36, 32, 8), False),
    "qwen3/14B": (_QWEN3, (5120, 17408, 40, 40, 8), False),
    "qwen3/32B": (_QWEN3, (5120, 25600, 64, 64, 8), False),
    "llama3_2/1B": ({**_LLAMA3, "head_dim": 64}, (2048, 8192, 16, 32, 8), True),
    "llama3_2/3B": ({**_LLAMA3, "head_dim": 128}, (3072, 8192, 28, 24, 8), True),
    "llama3_1/8B": ({**_LLAMA3, "head_dim": 128}, (4096, 14336, 32, 32, 8), False),
}
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def shape_names() -> list[str]:
    return list(_TABLE)


def write_random_model(name: str, folder: Path, *, dtype: str, seed: int = 0) -> Path:
    """A Hugging Face folder, without tokenizer, that loads as any other. Errors: ConfigError for an unknown name."""
    if name not in _TABLE:
        raise ConfigError(f"There are no shapes of {name}{nearest(name, list(_TABLE))}.")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from tora.models.load import build_model

    family, columns, tied = _TABLE[name]
    settings = {**family, **dict(zip(_COLUMNS, columns, strict=True)), "tie_word_embeddings": tied}
    model_type = settings.pop("model_type")
    config = AutoConfig.for_model(model_type, max_position_embeddings=32768, **settings)
    config.architectures = [_ARCHITECTURES[model_type]]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for ours, place in model.named_parameters():
        value = torch.randn(place.shape, generator=generator) * 0.02 if place.ndim > 1 else torch.ones(place.shape)
        tensors[model.names.parameter_to_hf(ours)] = value.to(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
