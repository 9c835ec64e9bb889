"""The chat template between the turns of an episode, as token ids.

What the policy sampled is never tokenised again. Only the text in between is: from the prompt's last message to the
first turn, and from a turn's stop token through the tools' answers to the next turn. Each is the difference of two
renderings of the template, so this holds only for a template that leaves earlier turns as they were, which is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from tora.environments.content import Content, Parts
from tora.errors import ConfigError

if TYPE_CHECKING:
    from tora.models.vision.processor import ImageProcessor

Messages = list[dict[str, Any]]
_THINK = "<think>\n"
_TURN = _THINK + 'I ask.\n</think>\n\n<tool_call>\n{"name": "tool", "arguments": {}}\n</tool_call>'
"""A turn in the form that models with and without reasoning write it."""

_ASKED: Messages = [{"role": "user", "content": "?"}]


class TurnTemplate:
    def __init__(
        self,
        tokenizer: Any,
        schemas: Sequence[dict[str, Any]],
        stop_token_ids: Sequence[int],
        variables: Mapping[str, Any] | None = None,
        processor: ImageProcessor | None = None,
    ) -> None:
        """`schemas`: of the tools. `variables`: the template's. `processor`: of a model that takes images.

        Raises ConfigError if the template does not show the tools, ends a turn with no stop token, or rewrites earlier
        turns.
        """
        self._template = tokenizer.chat_template if processor is None else processor.template
        if self._template is None:
            raise ConfigError(
                "environments and tools need a chat template, and the model has none; "
                "name a file that has one in chat_template"
            )
        self._tokenizer, self._processor = tokenizer, processor
        self.schemas, self._variables = [*schemas], dict(variables or {})
        self._newest: tuple[str | Messages, str] | None = None
        self._stops = [tokenizer.decode([token]) for token in stop_token_ids]
        self._check()

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for images and videos; none for a text model."""
        return () if self._processor is None else self._processor.placeholders

    def prompt(self, source: str | Messages, images: Sequence[bytes] = ()) -> tuple[int, ...]:
        """Token ids of the prompt up to the end of its last message, where an environment's observation begins.

        Raises `ConfigError` if there is no message, or its placeholders are not those of `images`.
        """
        return self._encode(self._start_of(source), images)

    def opening(self, source: str | Messages, observation: Content | None) -> tuple[int, ...]:
        """Token ids from the end of `prompt` to the first turn: the observation and the template's text after it.

        Raises `ConfigError` if the model takes no images and the observation has some.
        """
        messages, shown = self._messages(source), observation or Content("")
        self._check_takes(shown.images)
        start = self._start_of(source)
        whole = self._render(_with_observation(messages, shown.parts), turn_follows=True)
        if not whole.startswith(start):
            raise ConfigError("the chat template puts the end of a message, such as its images, before its beginning")
        return self._encode(whole[len(start) :], shown.images)

    def answers(self, messages: Messages, images: Sequence[bytes] = ()) -> tuple[int, ...]:
        """Token ids from a turn's stop token, exclusive, to the next turn: the tools' answers, `{"role": "tool"}`,
        whose placeholders stand for `images`. Raises as `opening` does."""
        return self._encode(self._after_turn(messages), images)

    def _start_of(self, source: str | Messages) -> str:
        """The text of `prompt`. The newest is kept, since all rollouts of a group begin with it."""
        newest = self._newest
        if newest is None or newest[0] != source:
            newest = self._newest = source, self._prompt_text(self._messages(source))
        return newest[1]

    def _prompt_text(self, messages: Messages) -> str:
        endings = [self._render(_with_observation(messages, end), turn_follows=True) for end in ("A", "B", "")]
        common = takewhile(lambda letters: len(set(letters)) == 1, zip(*endings, strict=False))
        return "".join(letters[0] for letters in common)

    def _after_turn(self, messages: Messages) -> str:
        turn = [*_ASKED, {"role": "assistant", "content": _TURN}]
        return self._after_stop(self._render([*turn, *messages], turn_follows=True)[len(self._first_turn) :])

    @cached_property
    def _first_turn(self) -> str:
        return _with_turn(self._render(_ASKED, turn_follows=True))

    def _after_stop(self, text: str) -> str:
        stop = next((stop for stop in self._stops if text.startswith(stop)), None)
        if stop is None:
            raise ConfigError(
                f"the chat template ends a turn with {text[:20]!r}, which is none of the model's stop tokens "
                f"({', '.join(map(repr, self._stops))}): episodes need a template whose turns end with one"
            )
        return text[len(stop) :]

    def _check(self) -> None:
        """A conversation of three turns, rendered whole, against the same text put together turn by turn."""
        name = self.schemas[0]["function"]["name"]
        conversation: Messages = [{"role": "user", "content": "?"}]
        text = self._render(conversation, turn_follows=True)
        if name not in text:
            raise ConfigError(f"the chat template does not show the tools to the model: {name} is not in the prompt")
        for number in range(3):
            answers: Messages = [{"role": "tool", "name": name, "content": f"answer {number}"}]
            conversation += [{"role": "assistant", "content": _TURN}, *answers]
            whole = self._render(conversation, turn_follows=True)
            text = _with_turn(text)
            if not whole.startswith(text):
                raise ConfigError(
                    "the chat template rewrites the turns of an episode, such as their reasoning, so that a policy "
                    "would be trained on tokens that it did not sample: use a template that keeps them"
                )
            rest = whole[len(text) :]
            text += rest.removesuffix(self._after_stop(rest)) + self._after_turn(answers)
            if text != whole:
                raise ConfigError("the chat template renders a tool's answer differently in a later turn")

    def _render(self, messages: Messages, *, turn_follows: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=self.schemas,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=turn_follows,
                **self._variables,
            )
        except TemplateError as error:
            raise ConfigError(f"the chat template cannot render a conversation with tools: {error}") from error

    def _encode(self, text: str, images: Sequence[bytes]) -> tuple[int, ...]:
        self._check_takes(images)
        if self._processor is not None:
            return self._processor.tokens(text, images)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _messages(self, source: str | Messages) -> Messages:
        messages: Messages = [{"role": "user", "content": source}] if isinstance(source, str) else source
        kinds = str if self._processor is None else (str, list)
        if not messages or not isinstance(messages[-1].get("content"), kinds):
            raise ConfigError("an environment's prompt must end in a message of text, or of chat parts with images")
        return messages

    def _check_takes(self, images: Sequence[bytes]) -> None:
        if images and self._processor is None:
            raise ConfigError(f"it has {len(images)} images, but the model takes none")


def _with_turn(text: str) -> str:
    """The text and a turn; some templates begin the turn's reasoning themselves."""
    return text.removesuffix(_THINK) + _TURN


def _with_observation(messages: Messages, observation: str | Parts) -> Messages:
    """As in TRL, the observation is appended to the last message, with nothing in between."""
    last, content = messages[-1], messages[-1]["content"]
    if isinstance(content, str) and isinstance(observation, str):
        return [*messages[:-1], {**last, "content": content + observation}]
    return [*messages[:-1], {**last, "content": [*_parts(content), *_parts(observation)]}]


def _parts(content: str | Parts) -> Parts:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
