"""Interleaved multimodal rotary positions (M-RoPE; Qwen3-VL technical report, 2025): time, row and column of a token.

A text token advances all three axes by one. The features of an image share the time at which the image starts, and
their row and column indices are added to the other two axes. After an image of h x w features, positions advance by
max(h, w), not h·w.

Shape letters: T packed tokens, D head size, I runs of placeholders.
"""

from __future__ import annotations

import numpy as np
import torch

from tora.models.decoder import Rope, RotaryTable


class MultimodalRotaryTable(RotaryTable):
    """Accepts positions [3, b, s]. Each axis rotates its own pairs of dimensions, interleaved as time, row, column,
    time, ..., as given by `mrope_section` of config.json."""

    @torch.no_grad()
    def forward(self, positions: torch.Tensor) -> Rope:
        """positions [b, s] (text only) or [3, b, s] -> cos, sin [b, s, D/2], float32."""
        if positions.ndim == 2:
            return super().forward(positions)
        angles = positions[..., None].float() * self.inverse_frequency
        angle = angles[0].clone()
        for axis, section in enumerate(self.config.rope_parameters["mrope_section"]):
            pairs = slice(axis, 3 * section, 3)
            if axis > 0:  # pairs assigned to neither row nor column belong to time
                angle[..., pairs] = angles[axis, ..., pairs]
        return angle.cos() * self.scale, angle.sin() * self.scale


def multimodal_positions(
    positions_T: np.ndarray,
    document_T: np.ndarray,
    starts_I: np.ndarray,
    sizes_I2: np.ndarray,
    branch_T: np.ndarray | None = None,
) -> np.ndarray:
    """Positions on the three axes, [3, T] int64, from the plain `positions_T`.

    `document_T`: the document of each token; completions belong to the document of their prompt, so that its images
    shift their positions too. `starts_I`: index in T of each run's first placeholder. `sizes_I2`: rows and columns of
    features of the run's image. `branch_T`: which completion of its document a token belongs to, -1 for the prompt;
    an image in a completion shifts no other. None if no document has several completions.
    """
    branch_T = np.full_like(document_T, -1) if branch_T is None else branch_T
    positions_3T = np.repeat(positions_T[None], 3, 0)
    for start, (rows, columns) in zip(starts_I, sizes_I2, strict=True):
        end = start + rows * columns
        first = positions_3T[0, start]
        after = (document_T == document_T[start]) & (positions_T > positions_T[end - 1])
        if branch_T[start] >= 0:
            after &= branch_T == branch_T[start]
        positions_3T[:, after] += max(rows, columns) - rows * columns
        positions_3T[:, start:end] = first
        positions_3T[1:, start:end] += np.indices((rows, columns)).reshape(2, -1)
    return positions_3T
