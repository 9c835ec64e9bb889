"""One CUDA graph per decode step: one launch instead of about twenty per layer. Shape letters as in `engine`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tora.models.attention import CachedAttention

DecodeStep = Callable[[torch.Tensor, CachedAttention], torch.Tensor]
"""Tokens [B] and the cache that they are appended to -> logits of the next tokens [B, V]."""


class GraphedStep:
    """Replays a recorded `DecodeStep`, and records it again whenever the cache's tensors have been replaced.

    The next call overwrites the returned logits. Between calls the weights may change in value but not in address.
    """

    def __init__(self, step: DecodeStep) -> None:
        self._step = step
        self._recorded_for: torch.Tensor | None = None

    def __call__(self, token_B: torch.Tensor, cache: CachedAttention) -> torch.Tensor:
        if self._recorded_for is not cache.mask_B11S:  # replaced together with the cache's other tensors
            self._record(token_B, cache)
        self._token_B.copy_(token_B)
        self._graph.replay()
        return self._logits_BV

    def _record(self, token_B: torch.Tensor, cache: CachedAttention) -> None:
        self._token_B = token_B.clone()
        # Run once outside the graph, so that libraries can allocate their buffers. Running a step again is harmless: it
        # writes to the same cache slots, and states that it moves on are put back.
        before = [state.clone() for state in cache.states()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(self._token_B, cache)
        torch.cuda.current_stream().wait_stream(side)
        for state, value in zip(cache.states(), before, strict=True):
            state.copy_(value)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = self._step(self._token_B, cache)
        self._recorded_for = cache.mask_B11S
