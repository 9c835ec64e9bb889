"""Datasets as sequences of rows.

A dataset is anything with `len` and `[i]` whose rows are mappings with a `prompt`: a string or a list of chat messages.
Images stand in the messages or in a column `images` or `image`, see `tora.tasks.image_rows`. A row's other columns go
to the reward functions under their names.
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


def _without_nulls(value: Any) -> Any:
    """Arrow fills the keys that a message lacks with nulls, and chat templates test for presence."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def missing_column(source: str, key: str, column: str, columns: Sequence[str]) -> str:
    """A sentence for a column that `key` of the config asks for and `source` lacks."""
    return f"{source} has no column {column} ({key}){nearest(column, columns)}"
