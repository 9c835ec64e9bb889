"""Chat messages to token ids, by the model's own chat template."""

from __future__ import annotations

from typing import Any

from tora.errors import ConfigError


def as_messages(source: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A string is what a user says. Raises `ConfigError` for what is neither string nor messages."""
    if not isinstance(source, str | list):
        raise ConfigError(f"a prompt is a {type(source).__name__}, expected a string or a list of chat messages")
    return [{"role": "user", "content": source}] if isinstance(source, str) else source


def encode_prompt(tokenizer: Any, source: str | list[dict[str, Any]]) -> tuple[int, ...]:
    """Token ids with the generation prompt.

    A string is a user message where the tokenizer has a chat template, and plain text where it has none.
    Raises `ConfigError` for chat messages without a template and for what is neither string nor messages.
    """
    messages = as_messages(source)
    if tokenizer.chat_template is None:
        if isinstance(source, str):
            return tuple(tokenizer(source)["input_ids"])
        raise ConfigError("the dataset's prompts are chat messages, but the tokenizer has no chat template")
    encoding = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    return tuple(encoding["input_ids"])
