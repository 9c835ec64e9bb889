"""The tokenizer in a model's folder, and the tokens that end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tora.errors import ConfigError, first_line

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The Hugging Face tokenizer. `chat_template`: the path of a file that takes the place of the model's own.

    Raises ConfigError if the folder has no tokenizer, it cannot be read, or there is no such file.
    """
    if not any((folder / name).is_file() for name in _FILES):
        raise ConfigError(f"model.path {str(folder)!r} holds no tokenizer, which is {', '.join(_FILES)}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises errors of many kinds for a damaged file
        raise ConfigError(
            f"the tokenizer of model.path {str(folder)!r} cannot be loaded: {first_line(error)}; download its files "
            "again"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def read_template(path: str) -> str:
    """The chat template in a file. Raises ConfigError if it cannot be read or is no template."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = Path(path).expanduser().read_text()
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"chat_template={path!r} cannot be read: {error}") from error
    except TemplateSyntaxError as error:
        if "unknown tag 'generation'" not in str(error):  # transformers' own tag
            raise ConfigError(f"chat_template={path!r} is no template: line {error.lineno}: {error.message}") from error
        text = Path(path).expanduser().read_text()
    return text


def stop_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of the tokenizer, of generation_config.json and of config.json, sorted.

    Raises ConfigError if one of the files is no JSON.
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        listed = _read(folder / name).get("eos_token_id")
        found |= set(listed) if isinstance(listed, list) else {listed}
    return tuple(sorted(found - {None}))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{str(file)!r} is no JSON: {error}; download it again") from error
    return found if isinstance(found, dict) else {}
