"""Names of repositories on the hub."""

from __future__ import annotations

import re

from tora.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_repo(name: str, key: str) -> None:
    """Raises ConfigError unless the name is `owner/name` or `name`."""
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError(f"{key}={name} is not the name of a repository on the hub, such as owner/name.")
