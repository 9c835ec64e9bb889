"""Tiny random models in Hugging Face's format, made in well under a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tora  # noqa: F401  (installs the import fixes that transformers' classes need; they load at first use)

Family = Literal["qwen3", "qwen2", "llama"]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CLASSES: dict[Family, str] = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
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
    """Writes config, weights and tokenizer; returns `folder`. The weights are large enough for logits that differ;
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
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=generator)
            else:  # norms: with scales of 1 their order and their neighbours would not show
                parameter.uniform_(0.5, 1.5, generator=generator)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each byte (ids 3 to 258) after three special ones; ChatML."""
    vocabulary = {word: i for i, word in enumerate([PAD, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=_CHAT_TEMPLATE,
    )
