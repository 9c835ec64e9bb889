"""Secrets in a config, which are written nowhere: neither into `config.yaml` nor to a metric logger."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(r"(^|[_.-])(token|secret|password|passwd|api_?key|access_key|secret_key|private_key)$", re.I)
"""Names of keys, and of environment variables, whose text is a secret."""
_SHORTEST = 8
"""Characters of an environment variable's value that is looked for in other values."""
_IN_URL = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


def redacted(tree: Any, *, references: bool = True) -> Any:
    """A copy of a config's tree without secrets: the text under a key such as `api_key`, user and password in a URL,
    and the value of an environment variable such as `HF_TOKEN`.

    `references`: a value that is a variable's becomes `${oc.env:NAME}`, with which the config can be loaded again.
    False for readers that would resolve it.
    """
    names = _secrets_of_environment()
    return _redacted(
        tree, "", {value: f"${{oc.env:{name}}}" if references else HIDDEN for value, name in names.items()}
    )


def _secrets_of_environment() -> dict[str, str]:
    """Names by value."""
    return {value: name for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST}


def _redacted(tree: Any, key: str, known: Mapping[str, str]) -> Any:
    if isinstance(tree, Mapping):
        return {name: _redacted(value, str(name), known) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_redacted(value, key, known) for value in tree]
    if not isinstance(tree, str) or not tree:
        return tree
    if tree in known:
        return known[tree]
    for value in known:
        tree = tree.replace(value, HIDDEN)
    return HIDDEN if _NAMES.search(key) and not tree.startswith("${") else _IN_URL.sub(HIDDEN, tree)
