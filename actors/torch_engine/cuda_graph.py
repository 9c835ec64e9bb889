"""One CUDA graph for a decode step: one launch instead of some twenty a layer. Shape letters as in `engine`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tora.models.attention import CachedAttention

DecodeStep = Callable[[torch.Tensor, CachedAttention], torch.Tensor]
"""Tokens [B] and the cache that they go into -> logits of the next ones [B, V]."""


class GraphedStep:
    """Replays a `DecodeStep`, which it records anew whenever the cache has moved.

    What it answers is overwritten by the next call. The weights must stay where they are in between; their values may
    change.
    """

    def __init__(self, step: DecodeStep) -> None:
        self._step = step
        self._recorded_for: torch.Tensor | None = None

    def __call__(self, token_B: torch.Tensor, cache: CachedAttention) -> torch.Tensor:
        if self._recorded_for is not cache.mask_B11S:  # it is replaced together with all that the cache holds
            self._record(token_B, cache)
        self._token_B.copy_(token_B)
        self._graph.replay()
        return self._logits_BV

    def _record(self, token_B: torch.Tensor, cache: CachedAttention) -> None:
        self._token_B = token_B.clone()
        # Once outside of the graph, where libraries may still allocate what they keep. A step writes into the same
        # slots however often it runs.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(self._token_B, cache)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = self._step(self._token_B, cache)
        self._recorded_for = cache.mask_B11S
