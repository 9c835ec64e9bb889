"""Strings that end a completion, found as vLLM finds them: in the text of the sampled tokens, decoded one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from tora.types import SampleRequest


class StopStrings:
    """The texts of all rows of a batch so far."""

    def __init__(self, tokenizer: Any, requests: Sequence[SampleRequest]) -> None:
        """`tokenizer`: a fast Hugging Face tokenizer. The requests have the same `Sampling.stop`, which is not
        empty."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = requests[0].sampling.stop
        self._longest = max(map(len, self._stop))
        prompts_B = [list(request.token_ids) for request in requests for _ in range(request.num_samples)]
        # the prompt tells the decoder whether the first token begins a word; it is not searched
        self._streams = [DecodeStream(ids=prompt, skip_special_tokens=False) for prompt in prompts_B]
        self._ends = [""] * len(prompts_B)

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """For each row, which of them has a stop string that ends with its newest token."""
        return [self._completes(row, token) for row, token in zip(rows, tokens, strict=True)]

    def _completes(self, row: int, token: int) -> bool:
        new = self._streams[row].step(self._tokenizer, token) or ""
        if not new:
            return False  # part of a character that later tokens complete
        seen = self._ends[row] + new
        found = any(stop in seen for stop in self._stop)
        self._ends[row] = seen[-(self._longest - 1) :] if self._longest > 1 else ""
        return found
