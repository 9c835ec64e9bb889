"""Prompts to token ids with the model's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tora.errors import ConfigError
from tora.models.chat import render
from tora.tasks.messages import Messages, as_messages

__all__ = ["as_messages", "check_template", "encode_prompt"]


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
    tokenizer: Any, source: str | Messages, variables: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Token ids of a prompt, with the template's generation prompt at the end. `variables`: the template's.

    A string is one user message if the tokenizer has a chat template, and plain text if it has none. A last message of
    the assistant is continued. Raises ConfigError if messages have no chat template or the template cannot render them,
    or if the prompt is neither a string nor a list of messages.
    """
    messages = as_messages(source)
    if tokenizer.chat_template is None:
        if isinstance(source, str):
            return tuple(tokenizer(source)["input_ids"])
        raise ConfigError(
            "the dataset's prompts are chat messages, but the tokenizer has no chat template; "
            "name a file that has one in chat_template"
        )
    text = render(tokenizer, messages, None, variables or {})
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
