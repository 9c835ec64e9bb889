"""Uploads to the Hugging Face hub, by huggingface_hub: at the end of a run, during it, or by `tora export`."""

from __future__ import annotations

from pathlib import Path

from tora.errors import ConfigError, first_line


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

    def upload(self, folder: Path, message: str) -> None:
        """Put the folder's files into the repository. Raises ConfigError if the hub refuses them."""
        try:
            self._api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=message, ignore_patterns=[".*"]
            )
        except Exception as error:  # the library's clients raise errors of many kinds
            raise ConfigError(f"the upload to {self.name} failed: {first_line(error)}") from error
