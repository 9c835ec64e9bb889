"""Shapes of released models, as in their config.json, and of small ones for benchmarks and tests."""

from __future__ import annotations

from typing import Any

from tora.errors import ConfigError, nearest

PATCH, MERGE = 16, 2
"""Pixels of a side of a patch, and patches of a side of a feature, in every vision model below."""
IMAGE_TOKENS = ("vision_bos_token", "vision_eos_token", "image_token", "video_token")
TOKEN_IDS = {name: i + 1 for i, name in enumerate(IMAGE_TOKENS)}
"""Ids of these tokens in the configs below, which come without a vocabulary."""
_COLUMNS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_QWEN2: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "rope_theta": 1e6}
_QWEN3: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151936, "rope_theta": 1e6, "head_dim": 128}
_VISION_2B: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
_VISION_8B = {
    **_VISION_2B,
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_VISION_TINY = {
    **_VISION_2B,
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 2,
    "deepstack_visual_indexes": [0],
}
_QWEN3_VL: dict[str, Any] = {**_QWEN3, "model_type": "qwen3_vl", "rope_theta": 5e6}
_LLAMA3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5}

_TABLE: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int], bool]] = {
    # name: family, columns, tied
    "tiny": ({**_QWEN3, "vocab_size": 4096, "head_dim": 64}, (256, 768, 2, 4, 2), True),
    "small": ({**_QWEN3, "vocab_size": 8192, "head_dim": 64}, (1024, 3072, 4, 16, 8), True),
    "tiny_vl": (
        {**_QWEN3_VL, "vocab_size": 4096, "head_dim": 64, "vision": _VISION_TINY},
        (256, 768, 2, 4, 2),
        True,
    ),
    "qwen3_vl/2B": ({**_QWEN3_VL, "vision": _VISION_2B}, (2048, 6144, 28, 16, 8), True),
    "qwen3_vl/4B": ({**_QWEN3_VL, "vision": _VISION_2B}, (2560, 9728, 36, 32, 8), True),
    "qwen3_vl/8B": ({**_QWEN3_VL, "vision": _VISION_8B}, (4096, 12288, 36, 32, 8), False),
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
    "smollm2/135M": (
        {"model_type": "llama", "vocab_size": 49152, "rope_theta": 1e5, "head_dim": 64},
        (576, 1536, 30, 9, 3),
        True,
    ),
    "llama3_2/1B": ({**_LLAMA3, "head_dim": 64}, (2048, 8192, 16, 32, 8), True),
    "llama3_2/3B": ({**_LLAMA3, "head_dim": 128}, (3072, 8192, 28, 24, 8), True),
    "llama3_1/8B": ({**_LLAMA3, "head_dim": 128}, (4096, 14336, 32, 32, 8), False),
}
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}

_FOLDERS = {
    "qwen2_5": "Qwen2.5-{}-Instruct",
    "qwen3": "Qwen3-{}",
    "qwen3_vl": "Qwen3-VL-{}-Instruct",
    "llama3_1": "Llama-3.1-{}-Instruct",
    "llama3_2": "Llama-3.2-{}-Instruct",
    "smollm2": "SmolLM2-{}-Instruct",
}
"""The last part of the hub's name, by family; {} is the size."""


def shape_names() -> list[str]:
    return list(_TABLE)


def shape_of_folder(folder: str) -> str | None:
    """The name of the shapes of a model whose hub name or folder ends so: `Qwen3-8B` -> `qwen3/8B`; None if unknown."""
    for name in _TABLE:
        family, slash, size = name.partition("/")
        if slash and _FOLDERS[family].format(size) == folder:
            return name
    return None


def shape_config(name: str) -> Any:
    """transformers' config of a model with these shapes. Raises ConfigError if the name is unknown."""
    if name not in _TABLE:
        raise ConfigError(f"There are no shapes named {name}{nearest(name, list(_TABLE))}.")
    from transformers import AutoConfig

    family, columns, tied = _TABLE[name]
    settings = {**family, **dict(zip(_COLUMNS, columns, strict=True)), "tie_word_embeddings": tied}
    settings["max_position_embeddings"] = 32768
    model_type, vision = settings.pop("model_type"), settings.pop("vision", None)
    if vision is None:
        config = AutoConfig.for_model(model_type, **settings)
    else:
        config = _vision_config(model_type, settings, vision)
    config.architectures = [_ARCHITECTURES[model_type]]
    return config


def _vision_config(model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """transformers' config of a Qwen3-VL with this text part and vision tower."""
    from transformers import AutoConfig

    pairs = text["head_dim"] // 2
    side = pairs * 5 // 16
    rope = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_interleaved": True,
        "mrope_section": [pairs - 2 * side, side, side],
    }
    return AutoConfig.for_model(
        model_type,
        text_config={**text, "rope_parameters": rope},
        vision_config={
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": text["hidden_size"],
            **vision,
        },
        image_token_id=TOKEN_IDS["image_token"],
        video_token_id=TOKEN_IDS["video_token"],
        vision_start_token_id=TOKEN_IDS["vision_bos_token"],
        vision_end_token_id=TOKEN_IDS["vision_eos_token"],
        tie_word_embeddings=text["tie_word_embeddings"],
    )
