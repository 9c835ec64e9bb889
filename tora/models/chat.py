"""Chat messages as text, by a model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tora.errors import ConfigError, first_line


def render(
    tokenizer: Any, messages: Sequence[dict[str, Any]], template: str | None, variables: Mapping[str, Any]
) -> str:
    """The messages and, at the end, what the template puts before an answer. `variables`: the template's.

    A last message of the assistant is left open, as in TRL: the policy continues it. Raises ConfigError if the template
    cannot render them, in the template's own words.
    """
    from jinja2 import TemplateError

    continues = bool(messages) and messages[-1].get("role") == "assistant"
    try:
        return tokenizer.apply_chat_template(
            [*messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            **variables,
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise ConfigError(f"the chat template cannot render its prompt: {first_line(error)}") from error
