"""The commands of `tora.bench`: what each takes."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import tora.bench

FOLDER = Path(tora.bench.__file__).parent
COMMANDS = sorted(file.stem for file in FOLDER.glob("*.py") if "ArgumentParser(" in file.read_text())


class Stopped(Exception):
    """In place of parsing."""


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_of_the_type_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """argparse converts words alone: a default of another type fails only where it is used."""
    found: list[Any] = []
    add = argparse.ArgumentParser.add_argument

    def recorded(parser: argparse.ArgumentParser, *names: str, **settings: Any) -> Any:
        found.append(add(parser, *names, **settings))
        return found[-1]

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", recorded)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Stopped):
        import_module(f"tora.bench.{name}").main()
    for action in found:
        if action.default is None or action.nargs == 0:
            continue
        kind = str if action.type is None else action.type
        values = action.default if isinstance(action.default, list) else [action.default]
        assert all(isinstance(value, kind) for value in values), action.dest
