"""Tiny random models that take images, made by transformers with their real processors: one row each.

Shared by tests and `tora.bench.models`, as `tora.bench.families` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tora.bench.families import LINEAR_ATTENTION, SIZES, byte_tokenizer, randomize

_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SIDE = 28
"""Pixels of a side of what the towers of fixed size take."""
_PATCH = 7


@dataclass(frozen=True)
class VisionFamily:
    """What a family's tiny model needs beyond the sizes that all share."""

    title: str
    """Its name in `docs/models.md`."""
    prefix: str
    """transformers' classes are `prefix`Config, `prefix`ForConditionalGeneration and `prefix`Processor."""
    tokens: Mapping[str, str]
    """Names of attributes of its tokenizer, and the special tokens that they are."""
    image: str
    """The chat template's text for an image."""
    config: Callable[[Mapping[str, int]], dict[str, Any]]
    """Arguments of the config besides `text_config`, from the ids of `tokens`."""
    processor: Callable[[], dict[str, Any]]
    """Arguments of the processor besides tokenizer and chat template."""
    text: dict[str, Any] = field(default_factory=dict)
    """Of the language model, beyond the sizes that all share."""
    extra: tuple[str, ...] = ()
    """More special tokens."""
    processor_class: str | None = None
    """Where it is not `prefix`Processor."""
    released: tuple[tuple[str, str], ...] = ()
    """Prefixes of tensors' names as transformers 5 writes them, and as they are in the folders that are released, which
    alone vLLM 0.32 reads; empty where they are the same."""


def _qwen2_5(ids: Mapping[str, int]) -> dict[str, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": _PATCH,
        "window_size": 4 * _PATCH,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 128,
    }
    names = {"vision_start_token_id": "vision_bos_token", "vision_end_token_id": "vision_eos_token"}
    own = {name: ids[token] for name, token in names.items()}
    return {
        **own,
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "vision_config": vision,
        "tie_word_embeddings": True,
    }


def _qwen2_5_processor() -> dict[str, Any]:
    import transformers

    size: Any = {"shortest_edge": (2 * _PATCH) ** 2, "longest_edge": 56**2}
    patches: Any = {"patch_size": _PATCH, "merge_size": 2}
    return {
        "image_processor": transformers.Qwen2VLImageProcessor(size=size, **patches),
        "video_processor": transformers.Qwen2VLVideoProcessor(**patches),
    }


_PATCH3 = 8


def _qwen3_5(ids: Mapping[str, int]) -> dict[str, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": _PATCH3,
        "out_hidden_size": 128,
        "num_position_embeddings": 25,
    }
    own = {f"vision_{end}_token_id": ids[f"vision_{word}_token"] for end, word in (("start", "bos"), ("end", "eos"))}
    return {
        **own,
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "vision_config": vision,
        "tie_word_embeddings": True,
    }


def _qwen3_5_processor() -> dict[str, Any]:
    import transformers

    size: Any = {"shortest_edge": (2 * _PATCH3) ** 2, "longest_edge": 64**2}
    patches: Any = {"patch_size": _PATCH3, "merge_size": 2}
    return {
        "image_processor": transformers.Qwen2VLImageProcessor(size=size, **patches),
        "video_processor": transformers.Qwen3VLVideoProcessor(**patches),
    }


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}


def _gemma3(ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["image_token"],
        "boi_token_id": ids["boi_token"],
        "eoi_token_id": ids["eoi_token"],
        "mm_tokens_per_image": 4,
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER},
        "tie_word_embeddings": True,
    }


def _gemma3_processor() -> dict[str, Any]:
    from transformers import Gemma3ImageProcessor

    size: Any = {"height": _SIDE, "width": _SIDE}
    return {"image_processor": Gemma3ImageProcessor(size=size), "image_seq_length": 4}


def _idefics3(ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["image_token"],
        "scale_factor": 2,
        "vision_config": dict(_TOWER),
        "tie_word_embeddings": True,
    }


def _pieces(name: str) -> dict[str, Any]:
    """An image is shown whole and in pieces of one side."""
    import transformers

    arguments: Any = {"size": {"longest_edge": 2 * _SIDE}, "max_image_size": {"longest_edge": _SIDE}}
    made = {"image_processor": getattr(transformers, f"{name}ImageProcessor")(**arguments), "image_seq_len": 4}
    if name == "SmolVLM":
        made["video_processor"] = transformers.SmolVLMVideoProcessor(**arguments)
    return made


def _llava_next(ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["image_token"],
        "image_grid_pinpoints": _PINPOINTS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_TOWER},
        "tie_word_embeddings": False,
    }


_PINPOINTS = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]


def _llava_next_processor() -> dict[str, Any]:
    from transformers import LlavaNextImageProcessor

    edge: Any = {"shortest_edge": _SIDE}
    crop: Any = {"height": _SIDE, "width": _SIDE}
    return {
        "image_processor": LlavaNextImageProcessor(size=edge, crop_size=crop, image_grid_pinpoints=_PINPOINTS),
        "patch_size": _PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }


_QWEN_TOKENS = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_PIECE_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_PLACES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
_GEMMA_TOKENS = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}}
_HYBRID = {
    **LINEAR_ATTENTION,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 64}
_TOWER_NAMES = (("vision_tower.", "vision_tower.vision_model."),)
_LLAMA = {"model_type": "llama"}

VISION_FAMILIES: dict[str, VisionFamily] = {
    "qwen2_5_vl": VisionFamily(
        "Qwen2.5-VL",
        "Qwen2_5_VL",
        _QWEN_TOKENS,
        "<|vision_start|><|image_pad|><|vision_end|>",
        _qwen2_5,
        _qwen2_5_processor,
        _MROPE,
    ),
    "qwen3_5_vl": VisionFamily(
        "Qwen3.5",
        "Qwen3_5",
        _QWEN_TOKENS,
        "<|vision_start|><|image_pad|><|vision_end|>",
        _qwen3_5,
        _qwen3_5_processor,
        _HYBRID,
        processor_class="Qwen3VLProcessor",
    ),
    "gemma3_vl": VisionFamily(
        "Gemma 3",
        "Gemma3",
        _GEMMA_TOKENS,
        "<start_of_image>",
        _gemma3,
        _gemma3_processor,
        _WINDOWS,
        released=_TOWER_NAMES,
    ),
    "idefics3": VisionFamily(
        "Idefics3", "Idefics3", _PIECE_TOKENS, "<image>", _idefics3, lambda: _pieces("Idefics3"), _LLAMA, _PLACES
    ),
    "smolvlm": VisionFamily(
        "SmolVLM", "SmolVLM", _PIECE_TOKENS, "<image>", _idefics3, lambda: _pieces("SmolVLM"), _LLAMA, _PLACES
    ),
    "llava_next": VisionFamily(
        "LLaVA-NeXT",
        "LlavaNext",
        {"image_token": "<image>"},
        "<image>\n",
        _llava_next,
        _llava_next_processor,
        {"model_type": "mistral"},
        released=_TOWER_NAMES,
    ),
}


def write_vision_family(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a model's config, weights and processor, and return its folder: two layers, 320 tokens, one per byte."""
    import transformers

    family = VISION_FAMILIES[name]
    tokenizer = _tokenizer(family)
    ids = {attribute: tokenizer.convert_tokens_to_ids(token) for attribute, token in family.tokens.items()}
    text: dict[str, Any] = {
        **SIZES,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    own = family.config(ids)
    text["tie_word_embeddings"] = own["tie_word_embeddings"]
    config = getattr(transformers, f"{family.prefix}Config")(text_config={**text, **family.text}, **own)
    config.eos_token_id = tokenizer.eos_token_id
    model = getattr(transformers, f"{family.prefix}ForConditionalGeneration")(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder)
    if family.released:
        _rename(folder / "model.safetensors", family.released)
    made = getattr(transformers, family.processor_class or f"{family.prefix}Processor")(
        tokenizer=tokenizer, chat_template=tokenizer.chat_template, **family.processor()
    )
    made.save_pretrained(folder)
    return folder


def _rename(file: Path, prefixes: tuple[tuple[str, str], ...]) -> None:
    from safetensors.torch import load_file, save_file

    def renamed(name: str) -> str:
        old, new = next(((old, new) for old, new in prefixes if name.startswith(old)), ("", ""))
        return new + name.removeprefix(old)

    tensors = {renamed(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _tokenizer(family: VisionFamily) -> Any:
    """ChatML, with one token per byte after the special tokens."""
    special = [_PAD, _START, _END, *family.tokens.values(), *family.extra]
    return byte_tokenizer(
        special,
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=[_START, *family.extra],
        extra_special_tokens=dict(family.tokens),
        chat_template=_template(family.image),
    )


def _template(image: str) -> str:
    parts = (
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}"
    )
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + parts + "{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
