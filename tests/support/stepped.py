"""A vLLM engine whose steps a test takes one by one."""

from __future__ import annotations

from typing import Any

import pytest
from peft_reference import wait_until

from actors.vllm_engine.engine import VLLMEngine


class Stepped:
    """An engine whose steps are counted out by the test."""

    def __init__(self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self._allowed, self._done = engine, 0, 0
        step = engine._llm.step

        def gated() -> Any:
            wait_until(lambda: self._done < self._allowed)
            outputs = step()
            self._done += 1
            return outputs

        monkeypatch.setattr(engine._llm, "step", gated)

    def allow(self, count: int) -> None:
        self._allowed += count
        if count < 1000:
            wait_until(lambda: self._done == self._allowed)
