"""Which rows of a table are kept, by the numbers or the lengths of texts in its columns.

`keep: 0.1..0.9` keeps the rows whose `pass_rate` is in that range: too easy and too hard prompts give groups with equal
rewards. A mapping names other columns: `keep: {pass_rate: 0.1..0.9, prompt: ..2000}`. A text counts its characters, a
list of messages those of all contents. Both ends belong to the range, and either may be left out. A row without a value
is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tora.errors import ConfigError, nearest
from tora.tasks.table import Table

Keep = str | Mapping[str, str]
PASS_RATE = "pass_rate"


def kept_rows(table: Table, source: str, keep: Keep) -> list[int]:
    """Indices of the rows kept, in order. Raises ConfigError if a range cannot be read, a column misses or holds
    neither numbers nor texts, or no row is left; `source` names the table."""
    ranges = keep if isinstance(keep, Mapping) else {PASS_RATE: keep}
    rows = range(len(table))
    for column, text in ranges.items():
        low, high = _ends(column, text)
        if column not in table.column_names:
            there = ", ".join(table.column_names)
            near = nearest(column, table.column_names)
            raise ConfigError(f"{source} has no column {column} (keep); it has {there}{near}")
        sizes = [_size(value, source, column) for value in table.values(column)]
        left = [row for row in rows if low <= sizes[row] <= high]
        if not left:
            known = [size for row in rows if not math.isnan(size := sizes[row])]
            found = f"its values are {min(known):g} to {max(known):g}" if known else "it has no values"
            raise ConfigError(f"keep leaves no rows of {source}: none has {column} in {text}; {found}")
        rows = left
    return list(rows)


def _ends(column: str, text: Any) -> tuple[float, float]:
    low, dots, high = str(text).partition("..")
    try:
        ends = float(low or -math.inf), float(high or math.inf)
    except ValueError:
        ends = (math.nan, math.nan)
    if not dots or not ends[0] <= ends[1]:
        raise ConfigError(f"dataset.keep: {column}={text} is not a range, such as 0.1..0.9, ..500 or 0.5..")
    return ends


def _size(value: Any, source: str, column: str) -> float:
    """A number's value or a text's characters; NaN, which is in no range, for null."""
    if value is None:
        return math.nan
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(_size(each, source, column) for each in value)
    if isinstance(value, Mapping):
        content = value.get("content", value.get("text"))
        return 0 if content is None else _size(content, source, column)
    raise ConfigError(f"{source}: keep needs numbers or texts in column {column}, which holds {type(value).__name__}")
