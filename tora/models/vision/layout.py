"""The layout of image patches: coordinates, interpolation of learned positions, and attention.

A grid is (1, rows, columns) in patches. Patches are ordered by block: the merge x merge neighbours that become one
feature are consecutive. Shape letters: I images, N patches of all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from tora.models.attention import PLAIN, LayerAttention, PackedAttention, Scores
from tora.models.varlen import VarlenFrameAttention, supports_varlen


class FrameAttention(PackedAttention):
    """Full attention among the patches of each image."""

    def __init__(self, lengths_I: torch.Tensor) -> None:
        """`lengths_I`: patches of each image, int64 on the model's device."""
        super().__init__(lengths_I)
        column = torch.arange(self.shape[1], device=lengths_I.device)
        inside = (column < lengths_I[:, None])[:, None, None]
        self.mask = None if bool(inside.all()) else inside
        """[I, 1, 1, longest] bool; None if no image is padded."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        assert scores == PLAIN
        out = F.scaled_dot_product_attention(*(self._documents(x) for x in (q, k, v)), attn_mask=self.mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad_T)[None]


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """The layout of all images of one forward, on the model's device."""

    coordinate_N2: torch.Tensor
    """int64: row and column of each patch in its image."""
    corner_N4: torch.Tensor
    """int64: indices of the four learned positions around each patch, with the grid stretched over the image."""
    corner_weight_N4: torch.Tensor
    """float32: their bilinear weights, which sum to 1."""
    attention: LayerAttention


def vision_layout(
    grid_IT: np.ndarray, *, merge: int, side: int, device: torch.device, dtype: torch.dtype
) -> VisionLayout:
    """`grid_IT`: int64 [I, 3], see `Pixels`; `side`: rows of the square grid of learned positions; `dtype`: the
    tower's."""
    assert (grid_IT[:, 0] == 1).all(), "an image has one frame"
    parts = [_image_layout(rows, columns, merge, side) for _, rows, columns in grid_IT.tolist()]
    coordinate_N2, corner_N4, corner_weight_N4 = (torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True))
    lengths_I = torch.from_numpy(grid_IT.prod(1)).to(device)
    attention = (VarlenFrameAttention if supports_varlen(device, dtype) else FrameAttention)(lengths_I)
    return VisionLayout(coordinate_N2, corner_N4, corner_weight_N4, attention)


@lru_cache(maxsize=64)
def _image_layout(rows: int, columns: int, merge: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors of `VisionLayout` for one image, on the CPU. The learned grid's corners align with the image's."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    blocks = grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    coordinate_N2 = blocks.reshape(-1, 2)
    spans = torch.tensor([rows, columns]).sub(1).clamp_min(1)
    position_N2 = coordinate_N2.float() * (side - 1) / spans
    low_N2 = position_N2.floor()
    fraction_N2 = position_N2 - low_N2
    corners, weights = [], []
    for down in (0, 1):
        for right in (0, 1):
            corner_N2 = (low_N2.long() + torch.tensor([down, right])).clamp_max(side - 1)
            weight_N2 = torch.where(torch.tensor([down, right]).bool(), fraction_N2, 1 - fraction_N2)
            corners.append(corner_N2[:, 0] * side + corner_N2[:, 1])
            weights.append(weight_N2.prod(1))
    return coordinate_N2, torch.stack(corners, 1), torch.stack(weights, 1)
