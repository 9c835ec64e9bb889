"""Convert a tree of plain values to the config's dataclasses, strictly: unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tora.config.aliases import ours_for
from tora.config.schema import RunConfig
from tora.errors import ConfigError, nearest

SCALARS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
"""Names of the types in messages and in the reference."""
_UNIONS = (Union, types.UnionType)


def defaults(schema: type) -> dict[str, Any]:
    """The schema's defaults as a tree, so that interpolations can refer to them."""
    tree: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            tree[field.name] = defaults(hints[field.name])
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            tree[field.name] = field.default
    return tree


def build(schema: type, tree: Any, key: str) -> Any:
    """An instance of the dataclass `schema`. `key` is the dotted path of `tree`, empty at the top.

    Raises ConfigError if a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{key}={show(tree)} must hold keys and values.")
    hints = get_type_hints(schema)
    for name, value in tree.items():
        if name not in hints:
            known = ours_for(join(key, name), value)
            if known is not None:
                raise ConfigError(f"Unknown key {join(key, name)}; {known}")
            near = _nearest_key(str(name), list(hints), key)
            raise ConfigError(f"Unknown key {join(key, name)}={show(value)}; the nearest is {near}.")
    for field in dataclasses.fields(schema):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in tree and not optional:
            raise ConfigError(f"Missing key {join(key, field.name)}.")
    return schema(**{name: _convert(hints[name], value, join(key, name)) for name, value in tree.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """The value, checked against its field's type; whole numbers become floats where a float is asked for."""
    if value is None and _inner(hint) is not hint:
        return None
    if isinstance(value, str) and get_origin(hint) in _UNIONS and str in get_args(hint):
        return value
    hint = _inner(hint)
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key)  # type: ignore[arg-type]
    if origin is Literal:
        for arg in args:
            if type(value) is type(arg) and value == arg:
                return arg
        names = choices(args)
        raise ConfigError(f"{key}={show(value)} must be one of {', '.join(names)}{nearest(str(value), names)}.")
    if origin is list:
        if isinstance(value, list):
            return [_convert(args[0], item, f"{key}.{i}") for i, item in enumerate(value)]
        raise ConfigError(f"{key}={show(value)} must be a list, as in [a,b].")
    if origin is Mapping:
        if isinstance(value, dict):
            return value
        raise ConfigError(f"{key}={show(value)} must hold names and values, as in {{name: value}}.")
    if origin is dict:
        if isinstance(value, dict):
            return value
        if isinstance(value, str) and "." in value:
            return {"_component_": value}
        raise ConfigError(f"{key}={show(value)} must hold _component_ and its arguments.")
    return _convert_scalar(hint, value, key)


def _convert_scalar(kind: type, value: Any, key: str) -> Any:
    if type(value) is kind and not (kind is float and not math.isfinite(value)):
        return value
    if kind is float and type(value) in (int, str):
        try:
            number = float(value)
        except ValueError:
            number = math.nan  # rejected below, with the key
        if math.isfinite(number):
            return number
    raise ConfigError(f"{key}={show(value)} must be {SCALARS[kind]}.")


def choices(args: Iterable[Any]) -> list[str]:
    """The values of a `Literal` as in YAML."""
    return [arg if isinstance(arg, str) else show(arg) for arg in args]


def _inner(hint: Any) -> Any:
    """`T` of `T | None` and of `T | str`; any other hint as it is."""
    if get_origin(hint) in _UNIONS:
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return hint


def _nearest_key(name: str, siblings: list[str], key: str) -> str:
    """A close match among the sibling keys, else among all keys of the config, else the nearest sibling."""
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)
    if not close:
        paths = {path.rpartition(".")[2]: path for path in _all_keys(RunConfig, "")}
        far = difflib.get_close_matches(name, paths, n=1, cutoff=0.75)
        if far:
            return paths[far[0]]
        close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.0)
    return join(key, close[0])


def _all_keys(schema: type, key: str) -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield join(key, name)
        if dataclasses.is_dataclass(_inner(hint)):
            yield from _all_keys(_inner(hint), join(key, name))


def join(key: str, name: Any) -> str:
    """`key.name`, or `name` at the top."""
    return f"{key}.{name}" if key else str(name)


def show(value: Any, longest: int = 80) -> str:
    """A value as it appears in messages: as JSON, on one line of at most `longest` characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
