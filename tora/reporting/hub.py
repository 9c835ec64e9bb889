"""Uploads to the Hugging Face hub, by huggingface_hub: at the end of a run, during it, or by `tora export`."""

from __future__ import annotations

import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tora.errors import ConfigError, first_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_repo(name: str, key: str) -> None:
    """Raises ConfigError unless the name is `owner/name` or `name`."""
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError(f"{key}={name} is not the name of a repository on the hub, such as owner/name.")


class HubRepo:
    """A repository of a model on the hub, made if it does not exist."""

    def __init__(self, name: str, *, private: bool = False) -> None:
        """Raises ConfigError if the hub cannot be reached, knows no token of the user, or refuses the repository."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        self._api = HfApi()
        try:
            url = self._api.create_repo(name, private=private, exist_ok=True)
        except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the hub repository {name} cannot be written to: {first_line(error)}; `hf auth login` or HF_TOKEN "
                "gives access"
            ) from error
        self.name = url.repo_id
        self.url = str(url)

    def upload(self, folder: Path, message: str, *, into: str = "") -> None:
        """Put the folder's files into the repository, under `into`. Raises ConfigError if the hub refuses them."""
        try:
            self._upload(folder, message, into, wait=True)
        except Exception as error:  # the library's clients raise errors of many kinds
            raise ConfigError(f"the upload to {self.name} failed: {first_line(error)}") from error

    def upload_in_background(self, folder: Path, message: str, *, into: str = "") -> Future[Any]:
        """As `upload`, in a thread. The folder must not change meanwhile."""
        return self._upload(folder, message, into, wait=False)

    def _upload(self, folder: Path, message: str, into: str, *, wait: bool) -> Any:
        return self._api.upload_folder(
            repo_id=self.name,
            folder_path=folder,
            path_in_repo=into or None,
            commit_message=message,
            run_as_future=not wait,
            ignore_patterns=[".*"],
        )
