"""Prompts to token ids with the model's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tora.errors import ConfigError


def as_messages(source: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompt as chat messages; a string is one user message. Raises ConfigError if it is neither."""
    if not isinstance(source, str | list):
        raise ConfigError(f"a prompt has type {type(source).__name__}, expected a string or a list of chat messages")
    return [{"role": "user", "content": source}] if isinstance(source, str) else source


def check_template(template: str | None, variables: Mapping[str, Any]) -> None:
    """Raises ConfigError if the chat template does not mention one of `chat_template_kwargs`."""
    for name in variables:
        if template is None:
            raise ConfigError(f"chat_template_kwargs.{name} needs a chat template, and the model has none")
        if not re.search(rf"\b{re.escape(str(name))}\b", template):
            raise ConfigError(
                f"chat_template_kwargs.{name} has no effect: the model's chat template has no such variable"
            )


def encode_prompt(
    tokenizer: Any, source: str | list[dict[str, Any]], variables: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Token ids of a prompt, with the template's generation prompt at the end. `variables`: the template's.

    A string is one user message if the tokenizer has a chat template, and plain text if it has none. Raises
    ConfigError if messages have no chat template, or the prompt is neither a string nor a list of messages.
    """
    messages = as_messages(source)
    if tokenizer.chat_template is None:
        if isinstance(source, str):
            return tuple(tokenizer(source)["input_ids"])
        raise ConfigError("the dataset's prompts are chat messages, but the tokenizer has no chat template")
    encoding = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, **variables or {}
    )
    return tuple(encoding["input_ids"])
