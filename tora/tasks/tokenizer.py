"""The tokenizer in a model's folder, and the tokens that end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tora.errors import ConfigError


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer with its chat template. Raises ConfigError if the folder has no tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"model.path {str(folder)!r} holds no tokenizer")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def stop_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of the tokenizer and of generation_config.json, sorted."""
    found = {tokenizer.eos_token_id}
    file = folder / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text()).get("eos_token_id")
        found |= set(listed) if isinstance(listed, list) else {listed}
    return tuple(sorted(found - {None}))
