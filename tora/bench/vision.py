"""Vision models with random weights for benchmarks: config, image processor, and a prompt with an image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from tora.models.vision.processor import ImageProcessor

PATCH, MERGE = 16, 2
_PAD = "<|endoftext|>"
_TOKENS = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_TEMPLATE = "<|vision_start|><|image_pad|><|vision_end|>"
TOKEN_IDS = {name: i + 1 for i, name in enumerate(_TOKENS)}
"""The model has no real vocabulary here; these are its first token ids."""


def vision_config(model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
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


def write_processor(folder: Path) -> None:
    """Write an image processor for up to 16 megapixels, with a tokenizer of only the placeholders."""
    import transformers
    from tokenizers import Tokenizer, models

    vocabulary = {_PAD: 0, **{token: TOKEN_IDS[name] for name, token in _TOKENS.items()}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=_PAD)),
        pad_token=_PAD,
        extra_special_tokens=_TOKENS,
    )
    size = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 1 << 24}
    transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=PATCH, merge_size=MERGE, size=size),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(patch_size=PATCH, merge_size=MERGE),
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)


def image_prompt(folder: Path, side: int) -> tuple[tuple[int, ...], bytes]:
    """The token ids of a square image of `side` x `side` pixels, and its PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((side, side), 64).convert("RGB").save(file, "PNG")
    image = file.getvalue()
    return ImageProcessor(folder).encode([{"role": "user", "content": [{"type": "image"}]}], [image]), image
