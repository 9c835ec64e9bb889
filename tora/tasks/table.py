"""Tables of the `datasets` library, from files and from the hub, whose images stay encoded as in the files."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tora.errors import ConfigError, first_line

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SAVED = ("state.json", "dataset_dict.json")
"""In a folder that `save_to_disk` has written: of a Dataset and of a DatasetDict."""


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

    def values(self, column: str) -> Sequence[Any]:
        """All values of a column that holds no images."""
        return self._dataset[column]


def load_files(path: str, split: str) -> Table:
    """A local file, a folder, a pattern such as `data/*.jsonl`, or a folder that `save_to_disk` has written.

    Raises ConfigError if it does not exist, is empty or cannot be read.
    """
    location = Path(path).expanduser()
    if location.is_dir():
        if any((location / name).is_file() for name in _SAVED):
            return _load_saved(path, location, split)
        return _load(path, str(location), split=split)
    files = [location] if location.exists() else sorted(map(Path, glob.glob(str(location), recursive=True)))
    if not files:
        raise ConfigError(f"dataset path {path!r} does not exist")
    kinds = {_ending(file) for file in files}
    for ending in kinds:
        if ending not in _READERS:
            raise ConfigError(f"dataset file {path!r} ends in {ending!r}, expected one of {', '.join(_READERS)}")
    if len({_READERS[ending] for ending in kinds}) > 1:
        raise ConfigError(f"dataset path {path!r} stands for files of several kinds: {', '.join(sorted(kinds))}")
    if all(file.stat().st_size == 0 for file in files):
        raise ConfigError(f"{path} has no rows")
    options: dict[str, Any] = {"sep": "\t"} if kinds == {".tsv"} else {}
    data_files = [glob.escape(str(file)) for file in files]
    return _load(path, _READERS[kinds.pop()], data_files=data_files, split=split, **options)


def load_hub(name: str, subset: str | None, split: str) -> Table:
    """A hub dataset. Raises ConfigError if it cannot be loaded."""
    return _load(name, name, subset, split=split, shows_progress=True)


def load_task(path: str, split: str, subset: str | None = None) -> Table:
    """A local file or folder if `path` exists, otherwise a hub dataset. Raises ConfigError if it cannot be loaded."""
    return load_files(path, split) if Path(path).exists() else load_hub(path, subset, split)


def _ending(file: Path) -> str:
    """`.jsonl` for `rows.JSONL` and `rows.jsonl.gz`."""
    name = file.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def _load(source: str, *args: Any, shows_progress: bool = False, **kwargs: Any) -> Table:
    from datasets import load_dataset

    with _one_sentence(source, shows_progress=shows_progress):
        return Table(load_dataset(*args, **kwargs))


def _load_saved(source: str, folder: Path, split: str) -> Table:
    """`split` selects from a DatasetDict's splits; the rows of a Dataset are all `train`."""
    from datasets import Dataset, ReadInstruction, concatenate_datasets, load_from_disk

    with _one_sentence(source):
        saved = load_from_disk(folder)
        splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
        lengths = {name: len(rows) for name, rows in splits.items()}
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
        return Table(
            concatenate_datasets(
                [
                    splits[part.splitname].select(
                        range(part.from_ or 0, lengths[part.splitname] if part.to is None else part.to)
                    )
                    for part in parts
                ]
            )
        )


@contextmanager
def _one_sentence(source: str, *, shows_progress: bool = False):
    """What the library raises as a ConfigError. Local files are read without a progress bar."""
    import datasets

    hides = not shows_progress and datasets.is_progress_bar_enabled()
    if hides:
        datasets.disable_progress_bars()
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # errors of many kinds for a wrong name, subset, split or file and a missing network
        raise ConfigError(f"dataset {source!r} cannot be loaded: {first_line(error.__cause__ or error)}") from error
    finally:
        if hides:
            datasets.enable_progress_bars()


class TaskRows:
    """A table whose rows are converted to a task's rows as they are read."""

    def __init__(self, table: Table, source: str, columns: set[str], make: Callable[[dict[str, Any]], dict[str, Any]]):
        """`make` converts a row and may raise ConfigError for it; `source` names the table in messages.

        Raises ConfigError if the table lacks one of `columns`.
        """
        missing = columns - set(table.column_names)
        if missing:
            there = ", ".join(table.column_names)
            raise ConfigError(
                f"{source} has no column {min(missing)!r}: the task needs {', '.join(sorted(columns))}; it has {there}"
            )
        self._table, self._source, self._make = table, source, make

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._make(self._table[index])
        except ConfigError as error:
            raise ConfigError(f"{self._source}: row {index} {error}") from error
