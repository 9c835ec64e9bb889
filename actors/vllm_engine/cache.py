"""Frees vLLM's key-value cache while it generates nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


class Cache:
    """The cache of one engine. Only the engine's thread may use it."""

    def __init__(self) -> None:
        self._is_freed = False

    def free(self, llm: LLMEngine) -> None:
        """Free its memory and forget what it holds. No request may be running."""
        if self._is_freed:
            return
        core = llm.engine_core.engine_core  # pyright: ignore[reportAttributeAccessIssue]
        # vLLM frees it only once its workers know which requests have finished, which the next step would tell them,
        # and while its scheduler is paused.
        while core.scheduler.has_requests() or core.batch_queue:
            llm.step()
        llm.sleep(level=0)
        llm.release_kv_cache_memory()
        self._is_freed = True

    def restore(self, llm: LLMEngine) -> None:
        """Take memory for it again if it was freed."""
        if self._is_freed:
            llm.wake_up(["kv_cache"])
            self._is_freed = False
