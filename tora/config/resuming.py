"""What a resumed run changes in the config of the run that it continues."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tora.config.convert import join, show
from tora.config.load import read_tree, to_dict
from tora.config.marks import Resume
from tora.config.schema import RunConfig
from tora.config.secrets import redacted
from tora.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Change:
    key: str
    """The dotted key."""
    before: Any
    now: Any
    mark: Resume

    def __str__(self) -> str:
        return f"{self.key} {show(self.before)} -> {show(self.now)}"


def check_resumed(config_yaml: Path, cfg: RunConfig) -> list[Change]:
    """The changes that a run resuming with `cfg` must report. `config_yaml`: as the run wrote it.

    A key that the file lacks is not compared, and none is if there is no file. Raises ConfigError for changes of what
    is fixed, or if the file cannot be read.
    """
    found = list(changes(read_tree(config_yaml), cfg)) if config_yaml.exists() else []
    fixed = [change for change in found if change.mark is Resume.FIXED]
    if fixed:
        raise ConfigError(
            f"resume_from_checkpoint=true continues a run with {_listed(fixed, 'before')}, not "
            f"{_listed(fixed, 'now')}; set it back, or start a new run in another output_dir."
        )
    return [change for change in found if change.mark is Resume.APPLIED]


def changes(before: Mapping[str, Any], cfg: RunConfig) -> Iterator[Change]:
    """Every key whose value differs from that in `before`, a config as a tree, in the schema's order."""
    yield from _changes(RunConfig, redacted(before), redacted(to_dict(cfg)), "", Resume.APPLIED)


def marks(schema: type = RunConfig, prefix: str = "", inherited: Resume = Resume.APPLIED) -> dict[str, Resume]:
    """The mark of every key that is not a section, by dotted key."""
    found: dict[str, Resume] = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        mark, section = _mark(hint, inherited), _section(hint)
        found |= {join(prefix, name): mark} if section is None else marks(section, join(prefix, name), mark)
    return found


def _changes(
    schema: type, before: Mapping[str, Any], now: Mapping[str, Any], prefix: str, inherited: Resume
) -> Iterator[Change]:
    for name, hint in get_type_hints(schema, include_extras=True).items():
        if name not in before:
            continue
        key, mark, section = join(prefix, name), _mark(hint, inherited), _section(hint)
        a, b = before[name], now[name]
        if section is not None and isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _changes(section, a, b, key, mark)
        elif isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _changes_of_component(a, b, key, mark)
        elif not _same(a, b):
            yield Change(key, a, b, mark)


def _changes_of_component(
    before: Mapping[str, Any], now: Mapping[str, Any], key: str, mark: Resume
) -> Iterator[Change]:
    """Changes by argument, or of the whole component if `_component_` differs."""
    fixed, mark = mark is Resume.FIXED_COMPONENT, Resume.APPLIED if mark is Resume.FIXED_COMPONENT else mark
    name = "_component_"
    if before.get(name) != now.get(name):
        yield Change(join(key, name), before.get(name), now.get(name), Resume.FIXED if fixed else mark)
        return
    for argument in sorted(before.keys() | now.keys()):
        if not _same(before.get(argument), now.get(argument)):
            yield Change(join(key, argument), before.get(argument), now.get(argument), mark)


def _same(before: Any, now: Any) -> bool:
    """Whether two values are equal, or name the same folder."""
    if isinstance(before, str) and isinstance(now, str) and before != now and "/" in before + now:
        return os.path.exists(before) and os.path.exists(now) and os.path.samefile(before, now)
    return before == now


def _listed(found: list[Change], side: str) -> str:
    return ", ".join(f"{change.key}={show(getattr(change, side))}" for change in found)


def _mark(hint: Any, inherited: Resume) -> Resume:
    """The mark in `Annotated[T, mark]`, on its own or in a union such as `Annotated[T, mark] | None`."""
    if get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Resume)), inherited)
    return next((mark for part in get_args(hint) if (mark := _mark(part, inherited)) is not inherited), inherited)


def _section(hint: Any) -> type | None:
    """The dataclass of a section's keys, also of an optional one."""
    if get_origin(hint) is Annotated:
        return _section(hint.__origin__)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((section for part in get_args(hint) if (section := _section(part)) is not None), None)
