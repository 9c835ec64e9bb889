"""Prompts that are too long: the limit, and what happens to a prompt above it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from tora.config.schema import OverlongPrompts, RunConfig
from tora.errors import ConfigError, OverlongPrompt
from tora.models.load import read_config

_EXTENDING = ("yarn", "linear", "dynamic")
"""Kinds of rotary scaling by which a model takes more tokens than its `max_position_embeddings`, as vLLM counts."""
_log = logging.getLogger(__name__)


class OverlongRows:
    """Deals with a dataset's overlong prompts, and remembers their rows. For any thread."""

    def __init__(self, action: OverlongPrompts, limit: int, num_rows: int, limited_by: str | None = None) -> None:
        """`limit`: tokens of the longest prompt that fits. `limited_by`: what sets the limit, as a clause."""
        self._action, self._limit, self._num_rows = action, limit, num_rows
        self._limited_by = limited_by or f"max_prompt_tokens={limit}"
        self._dropped: set[int] = set()
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def check(self, row: int) -> None:
        """Raises OverlongPrompt, before the row is read, if its prompt has been dropped before."""
        if row in self._dropped:
            raise OverlongPrompt(f"dataset row {row} has been dropped")

    def fit(self, row: int, token_ids: tuple[int, ...], *, has_images: bool) -> tuple[int, ...]:
        """The row's prompt as it is used.

        Raises OverlongPrompt if the prompt is dropped, and ConfigError if it is an error or all rows are dropped.
        """
        if len(token_ids) <= self._limit:
            return token_ids
        what = f"dataset row {row} has a prompt of {len(token_ids)} tokens, more than {self._limited_by}"
        if self._action == "error":
            raise ConfigError(what)
        if self._action == "truncate_left" and not has_images:
            self._name(what, "cut", "it loses its first tokens, as will others")
            return token_ids[-self._limit :]
        reason = "; a prompt with images cannot be cut" if self._action == "truncate_left" else ""
        with self._lock:
            self._dropped.add(row)
            all_dropped = len(self._dropped) == self._num_rows
        if all_dropped:
            raise ConfigError(f"every prompt of the dataset is too long: {what}{reason}")
        self._name(f"{what}{reason}", "dropped", "it is dropped, as will others be")
        raise OverlongPrompt(what)

    def _name(self, what: str, kind: str, consequence: str) -> None:
        with self._lock:
            is_first = kind not in self._named
            self._named.add(kind)
        if is_first:
            _log.warning("%s: %s (overlong_prompts=%s)", what, consequence, self._action)


def prompt_limit(cfg: RunConfig) -> tuple[int, str | None]:
    """Tokens of the longest prompt, and a clause for what sets the limit if not `max_prompt_tokens` alone.

    Prompt and completion together must fit the model. Raises ConfigError if a completion leaves no room for a prompt.
    """
    length = _model_length(read_config(Path(cfg.model.path)).get_text_config())
    room = length - cfg.max_generated_tokens
    if room < 1:
        raise ConfigError(
            f"max_generated_tokens={cfg.max_generated_tokens} leaves no room for a prompt: "
            f"the model takes {length} tokens."
        )
    if room >= cfg.max_prompt_tokens:
        return cfg.max_prompt_tokens, None
    return room, f"the {room} that max_generated_tokens={cfg.max_generated_tokens} leaves of the model's {length}"


def _model_length(config: Any) -> int:
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    length = int(config.max_position_embeddings)
    if scaling.get("rope_type") not in _EXTENDING:
        return length
    original = scaling.get("original_max_position_embeddings") or length
    return max(length, int(original * scaling.get("factor", 1.0)))
