"""A vision prompt in the form that Hugging Face's models expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tora.models.vision.processor import ImageProcessor


def hugging_face_inputs(processor: ImageProcessor, ids_BL: torch.Tensor, images: Sequence[bytes]) -> dict[str, Any]:
    """Keyword arguments of the model's forward: token ids [B, L], and what the processor makes of the images."""
    if not images:
        return {"input_ids": ids_BL}
    inputs = processor.model_inputs(" ".join([processor.mark] * len(images)), images)
    del inputs["attention_mask"]
    for kind in ("token_type_ids", "mm_token_type_ids"):
        if kind in inputs:
            inputs[kind] = (ids_BL == processor.image_token_id).int()
    return {**inputs, "input_ids": ids_BL}
