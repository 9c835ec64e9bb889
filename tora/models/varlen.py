"""Attention over packed documents on a GPU, with torch's variable-length flash attention and no padding."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from tora.models.attention import PLAIN, LayerAttention, PackedAttention, Scores
from tora.models.recurrence import DocumentRows, Recurrence

_CAUSAL, _ALL = (-1, 0), (-1, -1)
"""Attention windows: unlimited to the left, none or unlimited to the right."""
_MAX_HEAD = 256
"""Largest head of the kernel."""


def supports_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention applies: half precision on an Ampere or newer GPU."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class VarlenAttention:
    """Computes the same as `PackedAttention`, if `supports_varlen`."""

    def __init__(self, lengths_B: torch.Tensor) -> None:
        """`lengths_B`: int64 on the model's device."""
        self.lengths_B = lengths_B
        self.longest = int(lengths_B.max())
        self.ends = F.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32)

    def at(self, layer: int) -> LayerAttention:
        return self

    def recurrent_at(self, layer: int) -> Recurrence:
        return self._rows

    @cached_property
    def _rows(self) -> DocumentRows:
        return DocumentRows.of_documents(self.lengths_B)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        if scores.cap is not None or q.shape[3] > _MAX_HEAD:  # the kernel knows no cap
            return PackedAttention(self.lengths_B)(q, k, v, scores)
        return self._documents(q, k, v, _CAUSAL if scores.window is None else (scores.window - 1, 0), scores.scale)

    def _documents(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int], scale: float | None = None
    ) -> torch.Tensor:
        out_THD = varlen_attn(
            *(q[0], k[0], v[0]),
            *(self.ends, self.ends, self.longest, self.longest),
            scale=scale,
            window_size=window,
            enable_gqa=True,
        )
        assert isinstance(out_THD, torch.Tensor)  # other outputs are optional and were not requested
        return out_THD[None]


class VarlenFrameAttention(VarlenAttention):
    """Computes the same as `tora.models.vision.layout.FrameAttention`, if `supports_varlen`."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        assert scores == PLAIN
        return self._documents(q, k, v, _ALL)
