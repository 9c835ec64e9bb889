"""Datasets as sequences of rows.

A dataset is anything with `len` and `[i]` whose rows are mappings with a `prompt`: a string or a list of chat messages.
A row for an environment may have none, see `UNPROMPTED`.
Images are in the messages or in a column `images` or `image`, see `tora.tasks.image_rows`. All other columns are passed
to the reward functions by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tora.errors import ConfigError, nearest, raised
from tora.tasks.keep import Keep, kept_rows
from tora.tasks.messages import Messages, as_messages, checked
from tora.tasks.table import Table, load_files, load_hub

Row = dict[str, Any]
UNPROMPTED = ""
"""`Prompt.source` of a row without a prompt: an empty user message, which the environment's observation fills. As in
TRL, `reset` gets no `prompt` then."""


_WITHOUT = {
    "prompt_key": "; prompt_key=null is for an environment that gives the prompt",
    "answer_key": "; answer_key=null is for data without answers",
}


class Dataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Rows:
    """A table whose prompt and answer columns are renamed to `prompt` and `answer`; rows are read on demand."""

    def __init__(
        self,
        table: Table,
        source: str,
        prompt_key: str | None = "prompt",
        answer_key: str | None = "answer",
        system_prompt: str | None = None,
        few_shot: Messages | None = None,
        keep: Keep | None = None,
    ) -> None:
        """`source` names the table in messages. A key with a dot reads a field of a column that holds mappings. The
        other arguments are `file_dataset`'s.

        Raises ConfigError if the table is empty, lacks a column, or `keep` leaves no rows.
        """
        if len(table) == 0:
            raise ConfigError(f"{source} has no rows")
        for key, column in (("prompt_key", prompt_key), ("answer_key", answer_key)):
            if column is not None and not {column, column.partition(".")[0]} & set(table.column_names):
                raise ConfigError(missing_column(source, key, column, table.column_names) + _WITHOUT[key])
        self._table, self._source = table, source
        self._prompt_key, self._answer_key = prompt_key, answer_key
        self._system: Messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        try:
            self._few_shot = checked(few_shot) if few_shot else []
        except ConfigError as error:
            raise ConfigError(f"few_shot: {error}") from error
        self._kept = None if keep is None else kept_rows(table, source, keep)

    def __len__(self) -> int:
        return len(self._table) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> Row:
        place = index if self._kept is None else self._kept[index]
        row = self._table[place]
        try:
            prompt = self._with_examples(self._prompt_of(row))
            if self._answer_key is not None:
                row["answer"] = _gold(_taken(row, self._answer_key))
        except ConfigError as error:
            raise ConfigError(f"{self._source}: row {place} {error}") from error
        return row if self._prompt_key is None and prompt == UNPROMPTED else {**row, "prompt": prompt}

    def _prompt_of(self, row: Row) -> Any:
        return UNPROMPTED if self._prompt_key is None else _without_nulls(_taken(row, self._prompt_key))

    def _with_examples(self, prompt: Any) -> Any:
        """The prompt after system prompt and few-shot turns; a string becomes a user message."""
        if not self._system and not self._few_shot:
            return prompt
        messages = as_messages(prompt)
        own = messages[:1] if messages[0]["role"] == "system" else []
        if own and self._system:
            raise ConfigError("begins with a system message, and the dataset has a system_prompt; keep one of them")
        return [*self._system, *own, *self._few_shot, *messages[len(own) :]]


def file_dataset(
    path: str,
    split: str = "train",
    prompt_key: str | None = "prompt",
    answer_key: str | None = "answer",
    system_prompt: str | None = None,
    few_shot: Messages | None = None,
    keep: Keep | None = None,
) -> Rows:
    """A JSONL, JSON, CSV, TSV or Parquet file, also a compressed one, a pattern or a folder of them, or a folder that
    `save_to_disk` has written.

    `split` is as in the `datasets` library: all rows of a single file are `train`, `train[:90%]` selects a part, and
    files in a folder belong to the split that their names contain. `system_prompt` is put before each prompt as a
    system message, and `few_shot`, chat messages, between the two; a string prompt becomes a user message after them.
    `prompt_key` is None for rows that have no prompt, whose environment gives it, and `answer_key` for data without
    answers. `keep`: see `tora.tasks.keep`.

    Raises ConfigError if the file cannot be loaded, is empty or lacks a column, or `keep` leaves no rows.
    """
    return Rows(load_files(path, split), path, prompt_key, answer_key, system_prompt, few_shot, keep)


def hub_dataset(
    name: str,
    subset: str | None = None,
    split: str = "train",
    prompt_key: str | None = "prompt",
    answer_key: str | None = "answer",
    system_prompt: str | None = None,
    few_shot: Messages | None = None,
    keep: Keep | None = None,
) -> Rows:
    """A dataset on the Hugging Face hub; see `file_dataset`.

    Raises ConfigError if it, its subset or its split cannot be loaded, or if it is empty or lacks a column.
    """
    return Rows(load_hub(name, subset, split), name, prompt_key, answer_key, system_prompt, few_shot, keep)


def empty_rows(num_rows: int = 64) -> list[Row]:
    """For an environment whose `reset` makes up the task and returns the prompt. Raises ConfigError for no rows."""
    if num_rows < 1:
        raise ConfigError(f"empty_rows: num_rows is {num_rows}, expected at least 1")
    return [{} for _ in range(num_rows)]


def check_dataset(rows: Any, source: str) -> Dataset:
    """`rows` as a dataset. Raises ConfigError if it is something else, such as a table with several splits, a generator
    or a data frame. `source` names it."""
    if isinstance(rows, Mapping):
        names = ", ".join(map(str, rows))
        raise ConfigError(f"{source} returns a {type(rows).__name__} with {names}; return one of them")
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, str | bytes):
        raise ConfigError(
            f"{source} returns a {type(rows).__name__}, expected rows with len() and [i], such as a list of dicts"
        )
    if len(rows) == 0:
        raise ConfigError(f"{source} has no rows")
    try:
        first = rows[0]
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{source} returns a {type(rows).__name__}, whose rows are not rows[0], rows[1], ...; return a list of "
            "dicts"
        ) from error
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # of a user's dataset
        raise ConfigError(f"{source}: its row 0 cannot be read: {raised(error)}") from error
    if not isinstance(first, Mapping):
        raise ConfigError(f"{source} returns rows of type {type(first).__name__}, expected dicts with a prompt")
    return rows


def _taken(row: Row, key: str) -> Any:
    """The column `key`, removed from the row, or a field of a column for a key with a dot."""
    if key in row:
        return row.pop(key)
    column, *fields = key.split(".")
    value = row.get(column)
    for field in fields:
        if not isinstance(value, Mapping) or field not in value:
            there = f"; it has {', '.join(value)}" if isinstance(value, Mapping) else ""
            raise ConfigError(f"has no {key}{there}")
        value = value[field]
    return value


def _gold(answer: Any) -> Any:
    """The answer itself where a row holds it as verl's `reward_model` does."""
    return answer["ground_truth"] if isinstance(answer, Mapping) and "ground_truth" in answer else answer


def _without_nulls(value: Any) -> Any:
    """The value without nulls, which Arrow adds for keys that a message lacks; chat templates test for the keys."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def missing_column(source: str, key: str, column: str, columns: Sequence[str]) -> str:
    """The message for a column that the config's `key` names and `source` lacks."""
    there = f"; it has {', '.join(columns)}" if columns else ""
    return f"{source} has no column {column} ({key}){there}{nearest(column, columns)}"
