"""Where the patches of images lie: in rows and columns, on the learned grid of positions, and among each other.

A grid is (1, rows, columns) in patches. Patches come in blocks: the merge x merge neighbours that become one feature
follow each other. Shape letters: I images, N patches of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from tora.models.attention import PackedAttention


class FrameAttention(PackedAttention):
    """Every patch sees all patches of its image."""

    def __init__(self, lengths_I: torch.Tensor) -> None:
        """`lengths_I` int64 on the model's device."""
        super().__init__(lengths_I)
        column = torch.arange(self.shape[1], device=lengths_I.device)
        inside = (column < lengths_I[:, None])[:, None, None]
        self.seen = None if bool(inside.all()) else inside
        """[I, 1, 1, longest] booleans; None where no image is padded."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(*(self._documents(x) for x in (q, k, v)), attn_mask=self.seen)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad_T)[None]


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """On the model's device."""

    place_N2: torch.Tensor
    """int64: row and column of each patch in its image."""
    taps_N4: torch.Tensor
    """int64: the four learned positions around each patch, when the learned grid is stretched over its image."""
    shares_N4: torch.Tensor
    """float32: how much of each makes the patch's position, bilinearly."""
    frames: FrameAttention


def vision_layout(grid_IT: np.ndarray, *, merge: int, side: int, device: torch.device) -> VisionLayout:
    """`grid_IT` int64 [images, 3]; `side`: rows of the square grid of learned positions."""
    assert (grid_IT[:, 0] == 1).all(), "an image has one frame"
    parts = [_image_layout(rows, columns, merge, side) for _, rows, columns in grid_IT.tolist()]
    place_N2, taps_N4, shares_N4 = (torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True))
    lengths_I = torch.from_numpy(grid_IT.prod(1)).to(device)
    return VisionLayout(place_N2, taps_N4, shares_N4, FrameAttention(lengths_I))


@lru_cache(maxsize=64)
def _image_layout(rows: int, columns: int, merge: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`VisionLayout`'s tensors of one image, on the CPU. Corners of the learned grid lie on the image's corners."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    blocks = grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    place_N2 = blocks.reshape(-1, 2)
    spans = torch.tensor([rows, columns]).sub(1).clamp_min(1)
    at_N2 = place_N2.float() * (side - 1) / spans
    low_N2 = at_N2.floor()
    beyond_N2 = at_N2 - low_N2
    taps, shares = [], []
    for down in (0, 1):
        for right in (0, 1):
            corner_N2 = (low_N2.long() + torch.tensor([down, right])).clamp_max(side - 1)
            near_N2 = torch.where(torch.tensor([down, right]).bool(), beyond_N2, 1 - beyond_N2)
            taps.append(corner_N2[:, 0] * side + corner_N2[:, 1])
            shares.append(near_N2.prod(1))
    return place_N2, torch.stack(taps, 1), torch.stack(shares, 1)
