"""The folder that `examples/smollm2/make_model.py` makes is one that every program can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tora.tasks.encode import encode_prompt


def test_tokenizer_and_chat_template(smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    question = "What is 3 + 4?"
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith(f"<|im_start|>user\n{question}<|im_end|>\n")
    assert tokenizer.tokenize("x  123+45") == ["x", "ĠĠ", "1", "2", "3", "+", "4", "5"], "each digit is a token"
    assert tokenizer.decode(tokenizer("naïve 東京 🙂\n\n  x").input_ids) == "naïve 東京 🙂\n\n  x"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)
    ids = encode_prompt(tokenizer, question)
    assert tokenizer.decode(ids) == f"{text}<|im_start|>assistant\n"


def test_it_stops_and_samples_as_the_config_says(smollm2: Path) -> None:
    defaults = GenerationConfig.from_pretrained(smollm2)
    assert (defaults.bos_token_id, defaults.eos_token_id, defaults.pad_token_id) == (1, 2, 2)
    assert not defaults.do_sample and defaults.temperature in (None, 1.0) and defaults.top_p in (None, 1.0)


def test_the_weights_are_the_models(smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    ids = torch.tensor([encode_prompt(tokenizer, "What is the capital of France?")])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert "Paris" in tokenizer.decode(said) and said[-1] == 2, "an answer, and an end"
