"""Datasets as sequences of rows.

A dataset is anything with `len` and `[i]` whose rows are mappings with a `prompt`: a string or a list of chat messages.
Images are in the messages or in a column `images` or `image`, see `tora.tasks.image_rows`. All other columns are passed
to the reward functions by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tora.errors import ConfigError, nearest
from tora.tasks.table import Table, load_files, load_hub

Row = dict[str, Any]


class Dataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Rows:
    """A table whose prompt and answer columns are renamed to `prompt` and `answer`; rows are read on demand."""

    def __init__(
        self,
        table: Table,
        source: str,
        prompt_key: str = "prompt",
        answer_key: str | None = "answer",
        system_prompt: str | None = None,
    ) -> None:
        """`source` names the table in messages. `answer_key` is None for a table without answers.

        `system_prompt` is put before each prompt as a system message; a string prompt becomes a user message after it.
        Raises ConfigError if the table is empty or lacks a column.
        """
        if len(table) == 0:
            raise ConfigError(f"{source} has no rows")
        for key, column in (("prompt_key", prompt_key), ("answer_key", answer_key)):
            if column is not None and column not in table.column_names:
                raise ConfigError(missing_column(source, key, column, table.column_names))
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

    `split` is as in the `datasets` library: all rows of a single file are `train`, `train[:90%]` selects a part, and
    files in a folder belong to the split that their names contain. Raises ConfigError if the file cannot be loaded,
    is empty or lacks a column.
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
    """A dataset on the Hugging Face hub.

    Raises ConfigError if it, its subset or its split cannot be loaded, or if it is empty or lacks a column.
    """
    return Rows(load_hub(name, subset, split), name, prompt_key, answer_key, system_prompt)


def _without_nulls(value: Any) -> Any:
    """The value without nulls, which Arrow adds for keys that a message lacks; chat templates test for the keys."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def missing_column(source: str, key: str, column: str, columns: Sequence[str]) -> str:
    """The message for a column that the config's `key` names and `source` lacks."""
    return f"{source} has no column {column} ({key}){nearest(column, columns)}"
