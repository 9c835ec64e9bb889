"""Vision models with random weights for benchmarks: config, image processor, and a prompt with an image."""

from __future__ import annotations

import io
from pathlib import Path

from tora.models.released import MERGE, PATCH, TOKEN_IDS
from tora.models.vision.processor import ImageProcessor

_PAD = "<|endoftext|>"
_TOKENS = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_TEMPLATE = "<|vision_start|><|image_pad|><|vision_end|>"


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
