"""Interleaved multimodal rotary positions (M-RoPE; Qwen3-VL technical report, 2025): time, row and column of a token.

Text moves all three axes together. An image's features share the time at which it starts, and have their row and column
added to it; after an image of h x w features, text goes on max(h, w) further, not h·w.
Shape letters: T packed tokens, D head size, I runs of placeholders.
"""

from __future__ import annotations

import numpy as np
import torch

from tora.models.decoder import Rope, RotaryTable


class MultimodalRotaryTable(RotaryTable):
    """Positions may be [3, b, s]: each axis turns its own pairs, interleaved as time, row, column, time, ..."""

    @torch.no_grad()
    def forward(self, positions: torch.Tensor) -> Rope:
        """positions [b, s], for text alone, or [3, b, s] -> cos, sin [b, s, D/2], float32."""
        if positions.ndim == 2:
            return super().forward(positions)
        angles = positions[..., None].float() * self.inverse_frequency
        angle = angles[0].clone()
        for axis, section in enumerate(self.config.rope_parameters["mrope_section"]):
            pairs = slice(axis, 3 * section, 3)
            if axis > 0:  # what neither row nor column takes is time's
                angle[..., pairs] = angles[axis, ..., pairs]
        return angle.cos() * self.scale, angle.sin() * self.scale


def multimodal_positions(
    positions_T: np.ndarray, document_T: np.ndarray, starts_I: np.ndarray, sizes_I2: np.ndarray
) -> np.ndarray:
    """[3, T] int64, from plain positions.

    `document_T`: tokens of one number share what came before them, as completions do with their prompt. `starts_I`: the
    index in T of each run's first placeholder; `sizes_I2`: rows and columns of features of its image.
    """
    positions_3T = np.repeat(positions_T[None], 3, 0)
    for start, (rows, columns) in zip(starts_I, sizes_I2, strict=True):
        end = start + rows * columns
        first = positions_3T[0, start]
        after = (document_T == document_T[start]) & (positions_T > positions_T[end - 1])
        positions_3T[:, after] += max(rows, columns) - rows * columns
        positions_3T[:, start:end] = first
        positions_3T[1:, start:end] += np.indices((rows, columns)).reshape(2, -1)
    return positions_3T
