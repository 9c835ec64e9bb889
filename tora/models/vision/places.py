"""Where the features of images go among packed tokens.

Shape letters: T packed tokens, M placeholders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Places:
    """All arrays are int64."""

    index_M: np.ndarray
    """Index in T of each placeholder, ascending."""
    feature_M: np.ndarray
    """Which of the images' features, one after the other, takes its place."""
    positions_T: np.ndarray
    document_T: np.ndarray
    """The document of each token; completions belong to that of their prompt."""
    branch_T: np.ndarray
    """Which completion of its document a token belongs to, -1 for the prompt."""

    @classmethod
    def none(cls) -> Places:
        """Of images that are not shown."""
        return cls(*(np.empty(0, np.int64) for _ in range(5)))
