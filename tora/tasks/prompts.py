"""A dataset's rows as a stream of prompts, and all prompts and sampling settings of a run."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tora.config.components import make
from tora.config.environments import by_name
from tora.config.schema import Component, EvalConfig, OverlongPrompts, RunConfig
from tora.environments.chat import ChatTemplate
from tora.environments.template import TurnTemplate
from tora.environments.tools import check_turn_rewards, tool_schemas
from tora.environments.turns import Turns
from tora.errors import ConfigError, OverlongPrompt, raised
from tora.models.load import read_config
from tora.models.vision.processor import ImageProcessor, has_image_processor
from tora.tasks.dataset import UNPROMPTED, Dataset, check_dataset, missing_column
from tora.tasks.encode import as_messages, check_template, encode_prompt
from tora.tasks.image_rows import take_images
from tora.tasks.overlong import OverlongRows, prompt_limit
from tora.tasks.tokenizer import load_tokenizer, stop_token_ids
from tora.types import Prompt, Sampling

HIDDEN_COLUMNS = (
    "prompts",
    "completions",
    "completion_ids",
    "environments",
    "trainer_state",
    "log_metric",
    "log_extra",
)
"""Columns that no reward function gets, since TRL's signature has arguments of these names."""
_log = logging.getLogger(__name__)
_FIRST_HELD_OUT_ID = 1 << 32
"""Ids of evaluation prompts start here, above all those of training prompts."""


class PromptStream:
    """Prompts by position. Position i is in epoch `i // n`, which has its own permutation of the n rows.

    The permutation depends only on the seed and the epoch, so a resumed run sees the prompts that it would have seen.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: Any,
        max_prompt_tokens: int,
        seed: int = 0,
        image_processor: ImageProcessor | None = None,
        *,
        overlong: OverlongPrompts = "error",
        limited_by: str | None = None,
        turns: Turns | ChatTemplate | None = None,
        template_variables: Mapping[str, Any] | None = None,
        shuffle: bool = True,
        vocab_size: int | None = None,
        needs_prompts: bool = True,
        source: str = "the dataset",
    ) -> None:
        """`tokenizer` is a Hugging Face tokenizer; `image_processor` is None for a model that takes no images.
        `limited_by`: what sets `max_prompt_tokens`, as a clause; None for the config's key of that name. `turns`: None
        for rollouts without tools. `template_variables`: the chat template's; a row's own come on top. `shuffle`: False
        keeps the rows' order in every epoch. `vocab_size`: of the embedding; None if it need not be checked.
        `needs_prompts`: False if environments give the prompts of rows that have none. `source` names the rows in
        messages.

        Raises ConfigError if there are no rows, or `rows` is no dataset.
        """
        self._rows = rows = check_dataset(rows, source)
        self._reading = threading.Lock()
        self._warn_of_hidden(rows[0])
        self._vocab_size, self._needs_prompts = vocab_size, needs_prompts
        self._tokenizer = tokenizer
        self._overlong = OverlongRows(overlong, max_prompt_tokens, len(rows), limited_by)
        self._image_processor = image_processor
        self._turns, self._variables = turns, template_variables
        # Two epochs, since a step may straddle their boundary.
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: (
                np.random.default_rng([seed, epoch]).permutation(len(rows)) if shuffle else np.arange(len(rows))
            )
        )

    def prompt(self, position: int) -> Prompt:
        """The prompt at a position, whose id is the position.

        Raises OverlongPrompt if the prompt is too long and dropped, and ConfigError if the row has no usable prompt.
        """
        return self.read(position)()

    def read(self, position: int) -> Callable[[], Prompt]:
        """Reads the row at a position. What this returns makes its prompt, by any thread. Both raise as `prompt`."""
        epoch, place = divmod(position, len(self._rows))
        index = int(self._permutation(epoch)[place])
        return partial(self._make, position, index, self._row(index))

    def sequential(self, num_prompts: int, first_id: int = _FIRST_HELD_OUT_ID) -> list[Prompt]:
        """The first rows in order, for evaluation, without dropped ones; fewer if the dataset is smaller.

        Their ids start at `first_id`, by default 2**32, above those of the training prompts. Raises ConfigError as
        `prompt` does.
        """
        return _usable(
            lambda index: self._make(first_id + index, index, self._row(index)), num_prompts, len(self._rows)
        )

    def _row(self, index: int) -> dict[str, Any]:
        self._overlong.check(index)
        try:
            with self._reading:
                return dict(self._rows[index])
        except (ConfigError, MemoryError):
            raise
        except Exception as error:  # of a user's dataset, or of one that reads files as it goes
            raise ConfigError(f"dataset row {index} cannot be read: {raised(error)}") from error

    def _make(self, prompt_id: int, index: int, columns: dict[str, Any]) -> Prompt:
        if not self._needs_prompts and columns.get("prompt") is None:
            columns["prompt"] = UNPROMPTED
        if "prompt" not in columns:
            raise ConfigError(missing_column(f"dataset row {index}", "prompt", "prompt", list(columns)))
        try:
            source, images = take_images(columns)
            token_ids = self._encode(source, images, columns)
            self._check_known(token_ids)
        except ValueError as error:
            raise ConfigError(f"dataset row {index}: {error}") from error
        if not token_ids:
            raise ConfigError(f"dataset row {index} has an empty prompt")
        token_ids = self._overlong.fit(index, token_ids, has_images=bool(images))
        return Prompt(id=prompt_id, token_ids=token_ids, source=source, columns=columns, images=images)

    def _variables_of(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The chat template's variables, with those of the row's column `chat_template_kwargs`, as in TRL."""
        own = columns.get("chat_template_kwargs")
        if own is None:
            return dict(self._variables or {})
        if not isinstance(own, Mapping):
            raise ConfigError(f"its chat_template_kwargs is of type {type(own).__name__}, expected names and values")
        if self._turns is not None:
            raise ConfigError("it has chat_template_kwargs of its own, which episodes with tools cannot use")
        own = {name: value for name, value in own.items() if value is not None}
        processor = self._image_processor
        check_template(self._tokenizer.chat_template if processor is None else processor.template, own)
        return {**(self._variables or {}), **own}

    def _check_known(self, token_ids: tuple[int, ...]) -> None:
        if self._vocab_size is None or not token_ids or (largest := max(token_ids)) < self._vocab_size:
            return
        raise ConfigError(
            f"its prompt has the token {self._tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), and the "
            f"model has embeddings for {self._vocab_size}; use the tokenizer that belongs to the model"
        )

    @staticmethod
    def _warn_of_hidden(row: Mapping[str, Any]) -> None:
        for name in HIDDEN_COLUMNS:
            if name in row:
                _log.warning(
                    "the dataset's column %s is not passed to reward functions, which have an argument of that name",
                    name,
                )

    def _encode(
        self, source: str | list[dict[str, Any]], images: tuple[bytes, ...], columns: dict[str, Any]
    ) -> tuple[int, ...]:
        variables = self._variables_of(columns)
        if self._turns is not None:
            return self._turns.of(columns).prompt(source, images)
        if self._image_processor is None:
            if images:
                raise ConfigError(f"it has {len(images)} images, but the model takes none")
            return encode_prompt(self._tokenizer, source, variables)
        return self._image_processor.encode(as_messages(source), images, variables)


class RunPrompts:
    """Tokenizer, training prompts, evaluation prompts and sampling settings of a run."""

    def __init__(self, cfg: RunConfig) -> None:
        """Raises ConfigError if the tokenizer, the image processor or a dataset cannot be loaded."""
        model = Path(cfg.model.path)
        vocab_size = read_config(model).get_text_config().vocab_size  # first: its files name what is broken best
        self.tokenizer = load_tokenizer(model, cfg.chat_template)
        images = _image_processor(model, cfg.rollout.max_pixels)
        if images is not None and cfg.chat_template is not None:
            images.template = self.tokenizer.chat_template
        self.image_token = None if images is None else images.image_token_id
        """Id of the token that holds an image's place in a prompt; None for a model that takes no images."""

        check_template(
            self.tokenizer.chat_template if images is None else images.template, cfg.chat_template_kwargs or {}
        )
        limit, limited_by = prompt_limit(cfg)
        stop = stop_token_ids(model, self.tokenizer)
        self.turns = _turn_template(cfg, self.tokenizer, stop, images)
        """What stands between the turns of an episode; None for a run without environment, tools and agent."""

        def stream_of(dataset: Component, key: str) -> PromptStream:
            return PromptStream(
                make(dataset, key),
                self.tokenizer,
                limit,
                cfg.seed,
                images,
                overlong=cfg.overlong_prompts,
                limited_by=limited_by,
                turns=self.turns,
                template_variables=cfg.chat_template_kwargs,
                shuffle=cfg.shuffle,
                vocab_size=vocab_size,
                needs_prompts=cfg.environment_factory is None,
                source=str(dataset["_component_"]),
            )

        training = stream_of(cfg.dataset, "dataset")
        self.at: Callable[[int], Prompt] = training.prompt
        """The training prompt at a position. Raises OverlongPrompt for one that is dropped."""
        self.read: Callable[[int], Callable[[], Prompt]] = training.read
        """The same in two parts, of which the second may be called by several threads."""
        self.held_out: list[Prompt] = []
        """Prompts for evaluation, of all sets; empty if there is none."""
        self.eval_sets: dict[str, int] = {}
        """The number of prompts of each set by name, in the order of `held_out`; that of `eval.dataset` has no name."""
        if cfg.eval is not None:
            for number, (name, dataset) in enumerate({"": cfg.eval.dataset, **cfg.eval.more}.items(), start=1):
                key = f"eval.more.{name}" if name else "eval.dataset"
                found = stream_of(dataset, key).sequential(cfg.eval.num_prompts, number * _FIRST_HELD_OUT_ID)
                self.held_out += found
                self.eval_sets[name] = len(found)
        ends = _all_stop_tokens(cfg, stop, vocab_size)
        longest, strings = cfg.max_generated_tokens, tuple(cfg.stop)
        own = None if cfg.eval is None else cfg.eval.stop
        self.sampling = _sampling(cfg, longest, ends, strings)
        self.eval_sampling = _sampling(cfg.eval or cfg, longest, ends, strings if own is None else tuple(own))

    def probes(self, count: int) -> list[Prompt]:
        """As `first`; of an agent, whose prompts only the program knows, with the row's own messages."""
        found, chat = self.first(count), self.turns
        if not isinstance(chat, ChatTemplate):
            return found
        texts = [chat.pieces(m, (), [False] * len(m))[0] for m in (as_messages(p.source) for p in found)]
        return [replace(prompt, token_ids=chat.encode(text)) for prompt, text in zip(found, texts, strict=True)]

    def first(self, count: int) -> list[Prompt]:
        """The first training prompts that are not dropped. Raises ConfigError as `at` does."""
        return _usable(self.at, count)


def _usable(prompt_at: Callable[[int], Prompt], count: int, end: int | None = None) -> list[Prompt]:
    """The first `count` prompts that are not dropped, before position `end`."""
    found: list[Prompt] = []
    for position in itertools.count() if end is None else range(end):
        if len(found) == count:
            break
        with suppress(OverlongPrompt):
            found.append(prompt_at(position))
    return found


def _all_stop_tokens(cfg: RunConfig, own: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The model's end tokens and the config's. Raises ConfigError if the config names one that the model lacks."""
    for token in cfg.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"stop_token_ids has {token}, and the model's tokens are 0 to {vocab_size - 1}")
    ends = tuple(sorted({*own, *cfg.stop_token_ids}))
    if not ends and not cfg.stop:
        _log.warning(
            "the model names no end token: every completion will have max_generated_tokens; set stop_token_ids"
        )
    return ends


def _sampling(
    cfg: RunConfig | EvalConfig, max_tokens: int, stop_tokens: tuple[int, ...], stop: tuple[str, ...]
) -> Sampling:
    return Sampling(
        max_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        stop_token_ids=stop_tokens,
        stop=stop,
    )


def _turn_template(
    cfg: RunConfig, tokenizer: Any, stop: tuple[int, ...], images: ImageProcessor | None
) -> Turns | ChatTemplate | None:
    if cfg.agent is not None:
        return ChatTemplate(tokenizer, stop, cfg.chat_template_kwargs)
    if cfg.environment_factory is None and not cfg.tools:
        return None
    environments = by_name(cfg.environment_factory)
    if cfg.credit == "turn":
        for component in environments.values():
            check_turn_rewards(component)
    return Turns(
        {
            name: TurnTemplate(tokenizer, tool_schemas(component, cfg.tools), stop, cfg.chat_template_kwargs, images)
            for name, component in (environments or {"": None}).items()
        }
    )


def _image_processor(model: Path, max_pixels: int | None) -> ImageProcessor | None:
    """None for a text model. Raises ConfigError if a text model is given `max_pixels`."""
    if has_image_processor(model):
        return ImageProcessor(model, max_pixels)
    if max_pixels is not None:
        raise ConfigError(f"rollout.max_pixels={max_pixels} needs a model that takes images, but {model} takes none")
    return None
