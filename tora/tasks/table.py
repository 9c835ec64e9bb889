"""Tables of the `datasets` library, from files and from the hub, with images as they are in the files: encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tora.errors import ConfigError

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Table:
    """Rows as plain dicts. Columns of images hold `{"bytes", "path"}`, or lists of them, and not Pillow's pictures."""

    def __init__(self, dataset: Any) -> None:
        from datasets import Image, List

        def is_image(feature: Any) -> bool:
            return isinstance(feature, Image) or (isinstance(feature, List) and is_image(feature.feature))

        self.column_names: list[str] = dataset.column_names
        images = [name for name, feature in dataset.features.items() if is_image(feature)]
        self._dataset = dataset.remove_columns(images) if images else dataset
        # Arrow's own view of a row, in which nothing is decoded; decoded pictures would have to be encoded again.
        self._images = dataset.select_columns(images).with_format("arrow") if images else None

    def __len__(self) -> int:
        return len(self._dataset if self._images is None else self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._images is None:
            return dict(self._dataset[index])
        row = dict(self._dataset[index]) if self._dataset.column_names else {}
        return {**row, **self._images[index].to_pylist()[0]}


def load_files(path: str, split: str) -> Table:
    """A file or a folder, columns as they are. Raises `ConfigError`."""
    location = Path(path).expanduser()
    if not location.exists():
        raise ConfigError(f"dataset path {path!r} does not exist")
    if location.is_dir():
        return _load(path, str(location), split=split)
    reader = _READERS.get(location.suffix)
    if reader is None:
        raise ConfigError(f"dataset file {path!r} ends in {location.suffix!r}, expected one of {', '.join(_READERS)}")
    if location.stat().st_size == 0:
        raise ConfigError(f"{path} has no rows")
    return _load(path, reader, data_files=str(location), split=split)


def load_hub(name: str, subset: str | None, split: str) -> Table:
    """A hub dataset, columns as they are. Raises `ConfigError`."""
    return _load(name, name, subset, split=split)


def _load(source: str, *args: Any, **kwargs: Any) -> Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return Table(load_dataset(*args, **kwargs))
    except (DatasetsError, ValueError, OSError) as error:
        # The library reports a wrong name, subset, split or file and a missing network by these; none can be retried.
        raise ConfigError(f"dataset {source!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause) or type(cause).__name__).strip().splitlines()[0]


def load_task(path: str, split: str, subset: str | None = None) -> Table:
    """A local file or folder where `path` is one, a hub dataset otherwise. Raises `ConfigError`."""
    return load_files(path, split) if Path(path).exists() else load_hub(path, subset, split)


class TaskRows:
    """A table's rows, each made into a row of a task."""

    def __init__(self, table: Table, source: str, columns: set[str], make: Callable[[dict[str, Any]], dict[str, Any]]):
        """`make` may raise ConfigError for a row; `source` names the table in errors. Errors: ConfigError where one of
        `columns` is missing."""
        missing = columns - set(table.column_names)
        if missing:
            raise ConfigError(f"{source} has no column {min(missing)!r}: the task needs {', '.join(sorted(columns))}")
        self._table, self._source, self._make = table, source, make

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._make(self._table[index])
        except ConfigError as error:
            raise ConfigError(f"{self._source}: row {index} {error}") from error
