"""`tora help [KEY]`: what a key of the config means."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any

from tora.errors import ConfigError

_WIDEST = 100
"""Columns of text, on a wider terminal too."""


def add_parser(commands: Any) -> None:
    help_ = commands.add_parser("help", help="explain a config key, such as model.lora_rank", allow_abbrev=False)
    help_.add_argument(
        "key", nargs="?", metavar="KEY", help="a key, or a section such as rollout; without it, all sections are listed"
    )
    help_.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    print(overview() if args.key is None else explain(args.key))
    return 0


def overview() -> str:
    """All sections with the names of their keys."""
    from tora.config.reference import TOP, entries, sections

    docs = {entry.key: entry.doc for entry in entries()}
    blocks = []
    for section, members in sections().items():
        names = [entry.key.rpartition(".")[2] for entry in members]
        title = "Top level" if section == TOP else f"{section}: {docs[section]}"
        blocks.append(f"{_filled(title)}\n{_filled(', '.join(names), indent=4)}")
    return "\n\n".join([*blocks, "tora help KEY explains one of them, such as model.lora_rank."])


def explain(key: str) -> str:
    """The entry of a key, or all entries of a section. An argument of a component gives the component's entry.

    Raises ConfigError if the key is unknown, naming the nearest one.
    """
    from tora.config.aliases import ours_for
    from tora.config.reference import entries, nearest_key, sections

    by_key = {entry.key: entry for entry in entries()}
    owner = next((entry for entry in by_key.values() if entry.is_component and key.startswith(f"{entry.key}.")), None)
    entry = by_key.get(key, owner)
    if entry is None and (known := ours_for(key, None)) is not None:
        raise ConfigError(f"Unknown key {key}; {known}")
    if entry is None:
        raise ConfigError(f"Unknown key {key}; the nearest is {nearest_key(key)}.")
    members = sections()[key] if entry.is_section else []
    return "\n\n".join(
        f"{each.key}\n{_filled(each.facts(), indent=4)}\n\n{_filled(each.doc, indent=4)}" for each in [entry, *members]
    )


def _filled(text: str, indent: int = 0) -> str:
    margin, width = " " * indent, min(_WIDEST, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
