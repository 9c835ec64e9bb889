"""What a model's folder says about text: its tokenizer and the tokens that end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tora.errors import ConfigError


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer with the folder's own chat template. Errors: ConfigError where there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"model.path {str(folder)!r} holds no tokenizer")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def stop_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end token and those of generation_config.json, sorted."""
    found = {tokenizer.eos_token_id}
    file = folder / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text()).get("eos_token_id")
        found |= set(listed) if isinstance(listed, list) else {listed}
    return tuple(sorted(found - {None}))
