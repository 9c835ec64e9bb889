"""Tiny random models in Hugging Face's format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tora  # noqa: F401  (installs the import fixes that transformers' classes need; they load at first use)
from tora.bench.families import randomize

Family = Literal["qwen3", "qwen2", "llama"]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CLASSES: dict[Family, str] = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}
_VISION_TOKENS = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_text_model(
    folder: Path,
    family: Family = "qwen3",
    *,
    tied: bool = True,
    num_layers: int = 2,
    hidden_size: int = 128,
    vocab_size: int = 320,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Writes config, weights and tokenizer; returns `folder`. The weights are large enough to make logits differ, and
    biases and norm scales are not trivial. `overrides` go to the config."""
    tokenizer = make_tokenizer()
    specials: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = getattr(transformers, f"{_CLASSES[family]}Config")(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **specials,
        **overrides,
    )
    model = getattr(transformers, f"{_CLASSES[family]}ForCausalLM")(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_vl_model(
    folder: Path,
    *,
    tied: bool = True,
    num_layers: int = 3,
    hidden_size: int = 128,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """As `make_text_model`, for Qwen3-VL with its processor. `overrides` go to the config of the text part.

    A feature covers 32 x 32 pixels. DeepStack adds features after each of the first two layers.
    """
    tokenizer = make_tokenizer(vision=True)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _VISION_TOKENS.items()}
    text = {
        "vocab_size": 320,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": max(1, hidden_size // 64),
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": not tied,  # a trap: only the setting of the whole config counts
        **overrides,
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2],
    }
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        tie_word_embeddings=tied,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder)
    transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=16, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(patch_size=16, merge_size=2),
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_tokenizer(*, vision: bool = False) -> transformers.PreTrainedTokenizerFast:
    """ChatML, with one token per byte: ids 3 to 258, or 7 to 262 with `vision`, after the special tokens."""
    special = [PAD, START, END, *(_VISION_TOKENS.values() if vision else ())]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra: dict[str, Any] = {"extra_special_tokens": _VISION_TOKENS} if vision else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=_CHAT_TEMPLATE,
        **extra,
    )


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG of noise."""
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).save(file, "PNG")
    return file.getvalue()
