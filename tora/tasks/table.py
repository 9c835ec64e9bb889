"""Tables of the `datasets` library, from files and from the hub, whose images stay encoded as in the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tora.errors import ConfigError

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Table:
    """Rows as plain dicts. Image columns hold dicts of `bytes` and `path`, or lists of them, not Pillow images."""

    def __init__(self, dataset: Any) -> None:
        from datasets import Image, List

        def is_image(feature: Any) -> bool:
            return isinstance(feature, Image) or (isinstance(feature, List) and is_image(feature.feature))

        self.column_names: list[str] = dataset.column_names
        images = [name for name, feature in dataset.features.items() if is_image(feature)]
        self._dataset = dataset.remove_columns(images) if images else dataset
        # Arrow's view of a row decodes no images; decoded ones would have to be encoded again.
        self._images = dataset.select_columns(images).with_format("arrow") if images else None

    def __len__(self) -> int:
        return len(self._dataset if self._images is None else self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._images is None:
            return dict(self._dataset[index])
        row = dict(self._dataset[index]) if self._dataset.column_names else {}
        return {**row, **self._images[index].to_pylist()[0]}


def load_files(path: str, split: str) -> Table:
    """A local file or folder. Raises ConfigError if it does not exist, is empty or cannot be read."""
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
    """A hub dataset. Raises ConfigError if it cannot be loaded."""
    return _load(name, name, subset, split=split)


def _load(source: str, *args: Any, **kwargs: Any) -> Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return Table(load_dataset(*args, **kwargs))
    except (DatasetsError, ValueError, OSError) as error:
        # What the library raises for a wrong name, subset, split or file and for a missing network; retrying is no use.
        raise ConfigError(f"dataset {source!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause) or type(cause).__name__).strip().splitlines()[0]


def load_task(path: str, split: str, subset: str | None = None) -> Table:
    """A local file or folder if `path` exists, otherwise a hub dataset. Raises ConfigError if it cannot be loaded."""
    return load_files(path, split) if Path(path).exists() else load_hub(path, subset, split)


class TaskRows:
    """A table whose rows are converted to a task's rows as they are read."""

    def __init__(self, table: Table, source: str, columns: set[str], make: Callable[[dict[str, Any]], dict[str, Any]]):
        """`make` converts a row and may raise ConfigError for it; `source` names the table in messages.

        Raises ConfigError if the table lacks one of `columns`.
        """
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
