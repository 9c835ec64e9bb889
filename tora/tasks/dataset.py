"""Datasets as sequences of rows, and the streams of prompts made of them.

A dataset is anything with `len` and `[i]` whose rows are mappings with a `prompt`: a string or a list of chat messages.
Images stand in the messages or in a column `images` or `image`, see `tora.tasks.image_rows`. A row's other columns go
to the reward functions under their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from tora.errors import ConfigError, nearest
from tora.models.vision.processor import ImageProcessor
from tora.tasks.image_rows import take_images
from tora.tasks.table import Table, load_files, load_hub
from tora.types import Prompt

Row = dict[str, Any]
_FIRST_HELD_OUT_ID = 1 << 32


class Dataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Rows:
    """A table with its prompt and answer columns renamed to `prompt` and `answer`, read row by row."""

    def __init__(
        self,
        table: Table,
        source: str,
        prompt_key: str = "prompt",
        answer_key: str | None = "answer",
        system_prompt: str | None = None,
    ) -> None:
        """`source` names the table in errors. `answer_key` may be null.

        With `system_prompt` a string prompt becomes a system and a user message.
        Raises `ConfigError` when the table is empty or lacks a column.
        """
        if len(table) == 0:
            raise ConfigError(f"{source} has no rows")
        for key, column in (("prompt_key", prompt_key), ("answer_key", answer_key)):
            if column is not None and column not in table.column_names:
                raise ConfigError(_missing_column(source, key, column, table.column_names))
        self._table = table
        self._prompt_key = prompt_key
        self._answer_key = answer_key
        self._system_prompt = system_prompt

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        row = self._table[index]
        prompt = _without_nulls(row.pop(self._prompt_key))
        if self._system_prompt is not None:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = [{"role": "system", "content": self._system_prompt}, *messages]
        if self._answer_key is not None:
            row["answer"] = row.pop(self._answer_key)
        return {"prompt": prompt, **row}


def file_dataset(
    path: str,
    split: str = "train",
    prompt_key: str = "prompt",
    answer_key: str | None = "answer",
    system_prompt: str | None = None,
) -> Rows:
    """A JSONL, JSON or Parquet file, or a folder of them.

    `split` selects as the `datasets` library does: a file's rows are all `train`, and `train[:90%]` takes a part; the
    files of a folder are assigned to splits by their names. Raises `ConfigError`.
    """
    return Rows(load_files(path, split), path, prompt_key, answer_key, system_prompt)


def hub_dataset(
    name: str,
    subset: str | None = None,
    split: str = "train",
    prompt_key: str = "prompt",
    answer_key: str | None = "answer",
    system_prompt: str | None = None,
) -> Rows:
    """A dataset of the Hugging Face hub. Raises `ConfigError` when it, its subset or its split cannot be had."""
    return Rows(load_hub(name, subset, split), name, prompt_key, answer_key, system_prompt)


def _missing_column(source: str, key: str, column: str, columns: Sequence[str]) -> str:
    return f"{source} has no column {column} ({key}){nearest(column, columns)}"


def _without_nulls(value: Any) -> Any:
    """Arrow fills the keys that a message lacks with nulls, and chat templates test for presence."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


class PromptStream:
    """Prompts by position, without state: epoch `i // n` has its own permutation of the n rows, drawn from the seed.

    A resumed run that asks for position i gets the prompt that the interrupted run got.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: Any,
        max_prompt_tokens: int,
        seed: int = 0,
        image_processor: ImageProcessor | None = None,
    ) -> None:
        """`tokenizer` is a Hugging Face tokenizer; `image_processor` is None where the model takes no images."""
        if len(rows) == 0:
            raise ConfigError("the dataset has no rows")
        self._rows = rows
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._image_processor = image_processor
        # Two epochs: a step may straddle their boundary.
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows))
        )

    def prompt(self, position: int) -> Prompt:
        """Raises `ConfigError` when the row has no usable prompt or one that is too long."""
        epoch, place = divmod(position, len(self._rows))
        return self._make(position, int(self._permutation(epoch)[place]))

    def sequential(self, num_prompts: int) -> list[Prompt]:
        """The first rows in order, for evaluation; fewer when the dataset is smaller.

        Ids start at 2**32, so that they never meet the training stream's.
        """
        count = min(num_prompts, len(self._rows))
        return [self._make(_FIRST_HELD_OUT_ID + index, index) for index in range(count)]

    def _make(self, prompt_id: int, index: int) -> Prompt:
        columns = dict(self._rows[index])
        if "prompt" not in columns:
            raise ConfigError(_missing_column(f"dataset row {index}", "prompt", "prompt", list(columns)))
        try:
            source, images = take_images(columns)
            token_ids = self._encode(source, images)
        except ValueError as error:
            raise ConfigError(f"dataset row {index}: {error}") from error
        if not token_ids:
            raise ConfigError(f"dataset row {index} has an empty prompt")
        if len(token_ids) > self._max_prompt_tokens:
            raise ConfigError(
                f"dataset row {index} has a prompt of {len(token_ids)} tokens, more than "
                f"max_prompt_tokens={self._max_prompt_tokens}"
            )
        return Prompt(id=prompt_id, token_ids=token_ids, source=source, columns=columns, images=images)

    def _encode(self, source: str | list[dict[str, Any]], images: tuple[bytes, ...]) -> tuple[int, ...]:
        if self._image_processor is None:
            if images:
                raise ConfigError(f"it has {len(images)} images, and the model takes none")
            return encode_prompt(self._tokenizer, source)
        return self._image_processor.encode(as_messages(source), images)


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
