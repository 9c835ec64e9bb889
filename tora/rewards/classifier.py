"""A reward model: a transformers sequence classifier with one output."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, Literal

from tora.errors import ConfigError, first_line
from tora.rewards.functions import Completion


class reward_model:
    """Scores a prompt with its completion by the output of a sequence classifier, as text or as chat messages.

    Its tokenizer's own chat template renders the conversation; a tokenizer without one gets prompt and completion as
    two texts. Asynchronous only so that a worker holds one copy of the model, whatever `reward_processes` is.
    """

    def __init__(
        self,
        *,
        model: str,
        max_tokens: int | None = None,
        batch_size: int = 8,
        device: str = "cpu",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    ) -> None:
        """`model`: a folder, or a name on the hub. `max_tokens`: longer texts lose their first tokens; None: the
        model's own limit. Raises ConfigError if it cannot be loaded or has another number of outputs than one."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, truncation_side="left")
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).eval().to(device)
        except Exception as error:  # the library raises errors of many kinds
            raise ConfigError(f"reward_model: model={model!r} cannot be loaded: {first_line(error)}") from error
        if self._model.config.num_labels != 1:
            raise ConfigError(
                f"reward_model: model={model!r} has {self._model.config.num_labels} outputs, expected one score"
            )
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ConfigError(f"reward_model: batch_size={batch_size} and max_tokens={max_tokens} must be at least 1")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._model.config.pad_token_id is None:
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._max_tokens, self._batch_size, self._device = max_tokens or limit, batch_size, device
        self._turn = threading.Lock()

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
        """The classifier's output for each completion."""
        return await asyncio.to_thread(self.score, prompts, completions)

    def score(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> list[float]:
        import torch

        scores: list[float] = []
        with self._turn, torch.inference_mode():
            for start in range(0, len(completions), self._batch_size):
                part = slice(start, start + self._batch_size)
                inputs = self._encode(prompts[part], completions[part]).to(self._device)
                scores += self._model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _encode(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> Any:
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self._max_tokens}
        if self._tokenizer.chat_template is None:
            texts = (
                [p if isinstance(p, str) else _plain(p) for p in prompts],
                [c if isinstance(c, str) else _plain(c) for c in completions],
            )
            return self._tokenizer(*texts, return_tensors="pt", **options)
        chats = [_messages(p, "user") + _messages(c, "assistant") for p, c in zip(prompts, completions, strict=True)]
        rendered = [self._tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        return self._tokenizer(rendered, add_special_tokens=False, return_tensors="pt", **options)


def _messages(source: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": source}] if isinstance(source, str) else list(source)


def _plain(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)
