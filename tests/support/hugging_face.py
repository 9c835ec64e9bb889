"""Log-probs of given tokens in transformers and PEFT, the reference for every other system."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tora.types import LogprobRequest


class HuggingFace:
    """A base in `dtype` under a PEFT adapter, whose tensors PEFT keeps in float32."""

    def __init__(self, base: Path, adapter: Path, dtype: torch.dtype) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        self.model = PeftModel.from_pretrained(model, str(adapter)).eval()

    @torch.no_grad()
    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> np.ndarray:
        """Of all completions' tokens, end to end; the softmax is in float32."""
        with nullcontext() if adapter else self.model.disable_adapter():
            return np.concatenate([self._one(request) for request in requests])

    def _one(self, request: LogprobRequest) -> np.ndarray:
        start, ids = len(request.token_ids), torch.tensor([*request.token_ids, *request.completion])
        logits = self.model(input_ids=ids[None]).logits[0, start - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0].numpy()
