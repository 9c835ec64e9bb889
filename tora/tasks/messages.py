"""A row's prompt as chat messages: checked, and converted from ShareGPT's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tora.errors import ConfigError

Messages = list[dict[str, Any]]
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool", "function": "tool"}
_PARTS = "text or a list of parts"


def as_messages(source: Any) -> Messages:
    """The prompt as chat messages; a string is one user message. Raises ConfigError as `checked` does."""
    return [{"role": "user", "content": source}] if isinstance(source, str) else checked(source)


def checked(source: Any) -> Messages:
    """The messages of a list, those of ShareGPT's form, `{"from": "human", "value": ...}`, as role and content.

    Raises ConfigError, as a clause about the row's prompt, if one is no message or has no content.
    """
    if not isinstance(source, list):
        kind = "null" if source is None else f"of type {type(source).__name__}"
        raise ConfigError(f"its prompt is {kind}, expected text or a list of chat messages")
    if not source:
        raise ConfigError("its prompt is a list without messages")
    return [_checked(message, number) for number, message in enumerate(source)]


def _checked(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(
            f"message {number} of its prompt is of type {type(message).__name__}, expected role and content, as in "
            '{"role": "user", "content": "..."}'
        )
    if "from" in message and "role" not in message:
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        role = str(message["from"])
        message = {"role": _SHAREGPT_ROLES.get(role, role), "content": message.get("value"), **rest}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ConfigError(f"message {number} of its prompt has no role; it has {', '.join(map(str, message))}")
    if content is None and not message.get("tool_calls"):
        raise ConfigError(f"message {number} of its prompt, of the {role}, has no content, expected {_PARTS}")
    if content is not None and not isinstance(content, str | list):
        raise ConfigError(
            f"message {number} of its prompt has content of type {type(content).__name__}, expected {_PARTS}"
        )
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, Mapping):
            raise ConfigError(
                f"message {number} of its prompt has a part of type {type(part).__name__}, expected "
                '{"type": "text", "text": "..."}'
            )
    return dict(message)
