"""A vision prompt in the form that Hugging Face's models expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tora.models.vision.processor import ImageProcessor


def hugging_face_inputs(processor: ImageProcessor, ids_BL: torch.Tensor, images: Sequence[bytes]) -> dict[str, Any]:
    """Keyword arguments of the model's forward: token ids [B, L], and what the processor makes of the images."""
    return processor.inputs_for(ids_BL, images)
