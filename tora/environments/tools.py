"""Tools: their schemas for the chat template, and the calls in what the policy wrote."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MethodType
from typing import Any

from tora.config.components import instantiate, locate
from tora.config.schema import Component
from tora.environments.base import tool_methods
from tora.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """A call that cannot be read. The policy is told so, as it is told a tool's error."""

    reason: str
    """A sentence for the policy."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the policy wrote in one turn."""

    content: str
    """The text before the first call; all of it if there is none."""
    calls: tuple[ToolCall | MalformedCall, ...] = ()


ToolParser = Callable[[str], Parsed]
"""From a turn's text, special tokens included, without its stop token."""


def tool_schemas(factory: Component | None, tools: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON schemas of an environment's methods and of the functions at the dotted paths `tools`.

    Made by transformers from type hints and docstrings, as in TRL. `factory` is called unless it is a class. Raises
    `ConfigError` if something does not exist, two tools have one name, there is none, or one lacks a type hint or a
    docstring that describes its arguments.
    """
    functions = [locate(path) for path in tools]
    if factory is not None:
        made = locate(factory["_component_"])
        kind = made if inspect.isclass(made) else type(instantiate(factory))
        if not callable(getattr(kind, "reset", None)):
            raise ConfigError(f"environment_factory={factory['_component_']}: {kind.__name__} has no method reset")
        for name, function in tool_methods(kind).items():
            is_static = isinstance(inspect.getattr_static(kind, name), staticmethod)
            functions.append(function if is_static else MethodType(function, kind))
    if not functions:
        raise ConfigError(f"environment_factory={(factory or {}).get('_component_')} has no public method as a tool")
    names = [function.__name__ for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{names.count(name)} tools have the name {name}; give each tool its own")
    return [_schema(function) for function in functions]


def check_turn_rewards(factory: Component) -> None:
    """Raises `ConfigError` if the environment does not say what a turn has earned."""
    made = locate(factory["_component_"])
    if not callable(getattr(made if inspect.isclass(made) else instantiate(factory), "get_turn_reward", None)):
        raise ConfigError(
            f"environment_factory={factory['_component_']} has no method get_turn_reward, which credit=turn needs"
        )


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        return get_json_schema(function)
    except (
        DocstringParsingException,
        TypeHintParsingException,
        NameError,
    ) as error:  # a hint may name what is not there
        raise ConfigError(f"the tool {function.__name__} cannot be described to the model: {error}") from error


def make_parser(name: str, tokenizer: Any, schemas: Sequence[dict[str, Any]]) -> ToolParser:
    """`hermes` is built in; every other name is one of vLLM's parsers. Raises `ConfigError` if there is none, or
    if it does not fit the model's tokenizer."""
    if name == "hermes":
        return parse_hermes
    if find_spec("vllm") is None:
        raise ConfigError(f"tool_parser={name} is vLLM's, which is not installed; hermes needs no vLLM")
    from vllm.tool_parsers import ToolParserManager

    known = ToolParserManager.list_registered()
    if name not in known:
        raise ConfigError(f"tool_parser={name} is not one of vLLM's parsers{nearest(name, known)}")
    parser = VLLMParser(ToolParserManager.get_tool_parser(name), tokenizer, schemas)
    try:
        parser("")
    except (RuntimeError, ValueError) as error:  # the tokenizer lacks one of the format's tokens
        raise ConfigError(f"tool_parser={name} does not fit the model: {error}") from error
    return parser


_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def parse_hermes(text: str) -> Parsed:
    """The format of Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    As in vLLM's parser the last closing tag may be missing. Unlike there, one malformed call does not hide the others.
    """
    bodies = _HERMES.findall(text)
    content = text[: text.find("<tool_call>")] if bodies else text
    return Parsed(content.strip() if bodies else content, tuple(_call(body) for body in bodies))


def _call(body: str) -> ToolCall | MalformedCall:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        return MalformedCall(f"The tool call is not valid JSON: {error}.")
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return MalformedCall("A tool call must be a JSON object with a `name` and `arguments`.")
    return _checked(found["name"], found.get("arguments"))


def _checked(name: str, arguments: Any) -> ToolCall | MalformedCall:
    if not isinstance(arguments, dict):
        return MalformedCall(f"The `arguments` of the call to {name} must be a JSON object.")
    return ToolCall(name, arguments)


class VLLMParser:
    """One of vLLM 0.32's parsers. Each turn gets a new one, because they keep state.

    They do not tell a malformed call from plain text. A turn that holds a parser's opening tag but in which it finds no
    call, counts as malformed; of a parser that does not name such a tag, a malformed call stays plain text.
    """

    def __init__(self, make: Any, tokenizer: Any, schemas: Sequence[dict[str, Any]]) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        self._make, self._tokenizer = make, tokenizer
        self._request = ChatCompletionRequest.model_validate({"messages": [], "model": "policy", "tools": [*schemas]})

    def __call__(self, text: str) -> Parsed:
        parser = self._make(self._tokenizer, self._request.tools)
        found = parser.extract_tool_calls(text, self._request)
        if found.tools_called:
            calls = tuple(_from_json(call.function.name, call.function.arguments) for call in found.tool_calls)
            return Parsed((found.content or "").strip(), calls)
        tag = getattr(parser, "tool_call_start_token", None) or getattr(parser, "bot_token", None)
        if isinstance(tag, str) and tag in text:
            return Parsed(text[: text.find(tag)].strip(), (MalformedCall("The tool call cannot be read."),))
        return Parsed(text)


def _from_json(name: str, arguments: str) -> ToolCall | MalformedCall:
    try:
        return _checked(name, json.loads(arguments))
    except (ValueError, RecursionError) as error:
        return MalformedCall(f"The arguments of the call to {name} are not valid JSON: {error}.")
