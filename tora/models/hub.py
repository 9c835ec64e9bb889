"""Models of the Hugging Face hub: downloaded by huggingface_hub into its cache, and named by what the cache's folders
say, so that a run's config holds the name and the commit rather than a path of one machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tora.config.schema import ModelConfig
from tora.errors import ConfigError, first_line

_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
"""What Tora, transformers and vLLM read: no weights in other formats, no pictures and no logs."""
_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")


@dataclass(frozen=True, slots=True)
class HubModel:
    name: str
    """Such as `Qwen/Qwen3-0.6B`."""
    revision: str
    """The commit."""


def fetched(model: ModelConfig) -> ModelConfig:
    """The config with the folder of a hub model as `path`, downloaded unless huggingface_hub's cache has it. A `path`
    that is a folder stays.

    Raises ConfigError if it is neither a folder nor a model that the hub or the cache has, or if a folder is given a
    revision that it is not.
    """
    if Path(model.path).is_dir():
        found = origin(model.path)
        if model.revision is not None and (found is None or found.revision != model.revision):
            raise ConfigError(
                f"model.revision={model.revision} is for a model of the hub, but model.path={model.path} is a folder"
            )
        return model
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(model.path, revision=model.revision, allow_patterns=_FILES)
    except (OSError, ValueError, RuntimeError) as error:  # no such model or revision, no access, no network
        revision = "" if model.revision is None else f" at revision {model.revision}"
        raise ConfigError(
            f"model.path={model.path} is not a folder, and the hub gives no such model{revision}: {first_line(error)}"
        ) from error
    return replace(model, path=folder)


def named(model: ModelConfig) -> ModelConfig:
    """The inverse of `fetched`: a folder in huggingface_hub's cache as name and revision, any other as it is."""
    found = origin(model.path)
    return model if found is None else replace(model, path=found.name, revision=found.revision)


def origin(path: str) -> HubModel | None:
    """The hub model of a folder in huggingface_hub's cache; None for other paths."""
    found = _SNAPSHOT.search(path)
    return HubModel(f"{found[1]}/{found[2]}", found[3]) if found else None
