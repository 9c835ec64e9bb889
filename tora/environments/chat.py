"""Chats of a program that talks to the policy through an OpenAI-compatible endpoint, as text in pieces.

A conversation is cut where the policy spoke: the text before its first turn, and between two turns from a stop token to
the next turn. The turns themselves are never rendered: what the engine sampled stands between the pieces as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tora.errors import ConfigError

Message = Mapping[str, Any]
Reply = str
"""A turn as its message says it: content and calls as canonical JSON."""
_THINK_END = "</think>"


def reply_of(message: Message) -> Reply:
    """What a program sends back of a turn, whatever ids it gives the calls. Raises ValueError if a call cannot be
    read."""
    calls = [[call["function"]["name"], _arguments(call)] for call in message.get("tool_calls") or ()]
    return json.dumps([text_of(message) or "", calls], sort_keys=True)


def text_of(message: Message) -> str | None:
    """A message's text. Raises ValueError if it has something else."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(part["text"] for part in content)
    raise ValueError("a message's content must be text")


def _arguments(call: Message) -> Any:
    arguments = call["function"].get("arguments") or "{}"
    return json.loads(arguments) if isinstance(arguments, str) else arguments


class ChatTemplate:
    def __init__(
        self, tokenizer: Any, stop_token_ids: Sequence[int], variables: Mapping[str, Any] | None = None
    ) -> None:
        """`variables`: the template's. Raises ConfigError if the model has no chat template."""
        if tokenizer.chat_template is None:
            raise ConfigError(
                "agent needs a chat template, and the model has none; name a file that has one in chat_template"
            )
        self.tokenizer, self.stop_token_ids = tokenizer, tuple(stop_token_ids)
        self._stops = [tokenizer.decode([token]) for token in stop_token_ids]
        self._variables = dict(variables or {})
        self.first_token = self.encode(self._render([{"role": "user", "content": "?"}], ()))[0]
        """With which every conversation begins."""

    placeholders: tuple[int, ...] = ()

    def of(self, columns: Mapping[str, Any]) -> ChatTemplate:
        """As `tora.environments.turns.Turns.of`: all rows share it."""
        return self

    def prompt(self, source: Any, images: Sequence[bytes] = ()) -> tuple[int, ...]:
        """What all conversations about a row share: only the program knows what it will say."""
        if images:
            raise ConfigError("agent takes no images")
        return (self.first_token,)

    def pieces(self, messages: Sequence[Message], tools: Sequence[Message], own: Sequence[bool]) -> list[str]:
        """The text before each of the policy's turns, the next one included. `own`: which messages are its turns; other
        messages of the assistant, such as examples, are rendered. Raises ValueError if the template cannot render them.
        """
        marks = [f"\u2063turn{number}\u2063" for number in range(len(messages))]
        shown: list[Message] = [
            {"role": "assistant", "content": mark} if mine else _readable(message)
            for message, mark, mine in zip(messages, marks, own, strict=True)
        ]
        text, pieces = self._render(shown, tools), []
        for mark, mine in zip(marks, own, strict=True):
            if mine:
                piece, found, text = text.partition(mark)
                if not found:
                    raise ValueError("the chat template leaves out a turn")
                pieces.append(piece)
        return [*pieces, text]

    def kept(self, messages: Sequence[Message], tools: Sequence[Message]) -> list[bool]:
        """Which messages the template shows whole: of earlier turns it may leave out the reasoning, what stands before
        `</think>`."""
        marks = [f"\u2063reasoning{number}\u2063" for number in range(len(messages))]
        reasons = [m.get("role") == "assistant" and _THINK_END in (text_of(m) or "") for m in messages]
        if not any(reasons):
            return [True] * len(messages)
        shown = [
            {**_readable(message), "content": f"<think>\n{mark}\n{_THINK_END}\n\n?"} if reasoned else _readable(message)
            for message, mark, reasoned in zip(messages, marks, reasons, strict=True)
        ]
        text = self._render(shown, tools)
        return [not reasoned or mark in text for mark, reasoned in zip(marks, reasons, strict=True)]

    def after_turn(self, piece: str, *, stopped: bool) -> tuple[int, ...]:
        """Token ids of a piece that follows a turn; without the stop token if the turn ends with it."""
        if stopped:
            stop = next((stop for stop in self._stops if piece.startswith(stop)), None)
            if stop is None:
                raise ValueError(f"the chat template ends a turn with {piece[:20]!r}, which is no stop token")
            piece = piece[len(stop) :]
        return self.encode(piece)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Message], tools: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [*messages], tools=[*tools] or None, tokenize=False, add_generation_prompt=True, **self._variables
            )
        except TemplateError as error:
            raise ValueError(f"the chat template cannot render the messages: {error}") from error


def _readable(message: Message) -> Message:
    """A message as templates take it: text, and arguments of calls as objects."""
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call)}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "content": text_of(message) or "", **({"tool_calls": calls} if calls else {})}
