"""The reference of all config keys, from the dataclasses: their types, defaults, bounds and field docstrings.

`python -m tora.config.reference > docs/config.md` writes it as a page; `tora help KEY` prints single entries.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tora.config.bounds import bounds_of
from tora.config.convert import SCALARS, choices, join, show
from tora.config.schema import RunConfig

TOP = ""
"""The section of the keys without a dot."""
_HEADER = """\
<!-- Generated from tora/config/schema.py and sections.py: python -m tora.config.reference > docs/config.md -->

# Config keys

A config is a YAML file with these keys; on the command line, `key=value` overrides one of them. Keys without a default
are required. A *component* is a mapping with `_component_`, the dotted path of a callable, and keyword arguments for
that callable. `tora help KEY` prints an entry of this page.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the config."""

    key: str
    """Dotted, as on the command line."""
    type: str
    """In words, with the allowed values."""
    bounds: tuple[str, ...]
    """Such as `at least 1`."""
    is_optional: bool
    """Whether null is allowed."""
    default: str | None
    """As in YAML, on one line; None for a required key, empty for a section whose keys all have defaults."""
    doc: str
    """The field's docstring as one paragraph."""
    is_section: bool
    """Whether it contains other keys."""
    is_component: bool
    """Whether it holds a component, or a list of them, whose arguments are not listed here."""

    def facts(self, quote: str = "") -> str:
        """Type, bounds and default as one line; `quote` goes around the default."""
        kind = ", ".join([self.type, *self.bounds, *(["or null"] if self.is_optional else [])])
        if self.default is None:
            return f"{kind}; required"
        return f"{kind}; default {quote}{self.default}{quote}" if self.default else kind


def entries(schema: type = RunConfig, prefix: str = "") -> Iterator[Entry]:
    """Every key in the schema's order; a section comes right before its own keys."""
    hints, docs, bounds = get_type_hints(schema), _docstrings(schema), bounds_of(schema)
    for field in dataclasses.fields(schema):
        key, hint = join(prefix, field.name), hints[field.name]
        section = next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)
        yield Entry(
            key=key,
            type=_words(hint),
            bounds=tuple(map(str, bounds[field.name])),
            is_optional=type(None) in get_args(hint),
            default=_default(field),
            doc=docs.get(field.name, ""),
            is_section=section is not None,
            is_component=section is None and dict in (get_origin(hint), *map(get_origin, get_args(hint))),
        )
        if isinstance(section, type):
            yield from entries(section, key)


def sections() -> dict[str, list[Entry]]:
    """The keys by section: first those without a dot, then those of `model`, `rollout` and so on, by name."""
    found: dict[str, list[Entry]] = {TOP: []}
    for entry in entries():
        if entry.is_section:
            found[entry.key] = []
        else:
            found[entry.key.rpartition(".")[0]].append(entry)
    return found


def nearest_key(word: str) -> str:
    """The key most like `word`: as a whole if that is close, otherwise by its last part."""
    keys = [entry.key for entry in entries()]
    if close := difflib.get_close_matches(word, keys, n=1, cutoff=0.85):
        return close[0]
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys)}
    if close := difflib.get_close_matches(word.rpartition(".")[2], by_name, n=1, cutoff=0.75):
        return by_name[close[0]]
    return difflib.get_close_matches(word, keys, n=1, cutoff=0.0)[0]


def page() -> str:
    """The whole reference in Markdown."""
    intros = {entry.key: entry for entry in entries() if entry.is_section}
    parts = [_HEADER]
    for section, members in sections().items():
        intro = intros.get(section)
        parts.append(f"## {section or 'Top level'}\n")
        if intro is not None:
            parts.append(_body(intro))
        parts += [f"### `{entry.key}`\n\n{_body(entry)}" for entry in members]
    return "\n".join(parts)


def _body(entry: Entry) -> str:
    doc = textwrap.fill(entry.doc, width=120, break_long_words=False, break_on_hyphens=False)
    return f"*{entry.facts('`')}*\n\n{doc}\n"


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return f"one of {', '.join(choices(args))}"
    if origin is list:
        return "a list of components" if get_origin(args[0]) is dict else f"a list of {_words(args[0])}"
    if origin is Mapping:
        return "names and values"
    if origin is dict:
        return "a component"
    return SCALARS.get(hint, "a section")


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return None
    if dataclasses.is_dataclass(value):
        return ""
    return value if isinstance(value, str) else show(value, longest=200)


@cache
def _docstrings(schema: type) -> dict[str, str]:
    """String literals that follow the fields in the source, each as one paragraph."""
    return _docstrings_of_file(Path(inspect.getfile(schema)))[schema.__name__]


@cache
def _docstrings_of_file(file: Path) -> dict[str, dict[str, str]]:
    """By class and field."""
    return {
        node.name: dict(_documented(node.body))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, following in pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                yield name, " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
