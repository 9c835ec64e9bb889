"""A vision prompt in the form that Hugging Face's Qwen3-VL expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tora.models.vision.processor import ImageProcessor


def hugging_face_inputs(processor: ImageProcessor, ids_BL: torch.Tensor, images: Sequence[bytes]) -> dict[str, Any]:
    """Keyword arguments of the model's forward: token ids [B, L], and pixels if there are images."""
    if not images:
        return {"input_ids": ids_BL}
    pixels = processor.pixels(images)
    return {
        "input_ids": ids_BL,
        "pixel_values": torch.from_numpy(pixels.patches_ND),
        "image_grid_thw": torch.from_numpy(pixels.grid_IT),
        "mm_token_type_ids": (ids_BL == processor.image_token_id).int(),
    }
