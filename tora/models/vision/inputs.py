"""From packed tokens and the pixels of their images to what a vision model's forward takes.

Shape letters: T packed tokens, I runs of placeholders, M placeholders, N patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tora.models.decoder import Decoder
from tora.models.vision.layout import vision_layout
from tora.models.vision.mrope import multimodal_positions
from tora.models.vision.processor import ImageProcessor, Pixels
from tora.models.vision.qwen3_vl import ImageInputs, Qwen3VL


class ImageReader:
    """Opens the model's image processor when the first images come, and reads images with it."""

    def __init__(self, model: Decoder, processor: Callable[[], ImageProcessor] | None, device: torch.device) -> None:
        """`processor` is None for prompts of text."""
        self._model, self._open, self._device = model, processor, device
        self._processor: ImageProcessor | None = None

    def __call__(self, images: Sequence[bytes], **tokens: np.ndarray) -> tuple[ImageInputs, np.ndarray]:
        """`image_inputs` of distinct encoded images. Errors: ValueError as there, and where the model takes none."""
        if not isinstance(self._model, Qwen3VL) or self._open is None:
            raise ValueError("prompts have images, and the model takes none")
        if self._processor is None:
            self._processor = self._open()
        return image_inputs(self._model, self._processor.pixels(images), device=self._device, **tokens)


def image_inputs(
    model: Qwen3VL,
    pixels: Pixels,
    *,
    tokens_T: np.ndarray,
    positions_T: np.ndarray,
    document_T: np.ndarray,
    in_prompt_T: np.ndarray,
    image_I: np.ndarray,
    device: torch.device,
) -> tuple[ImageInputs, np.ndarray]:
    """The distinct images in their places, and the tokens' positions [3, T] int64.

    `document_T` as in `multimodal_positions`; `in_prompt_T`: elsewhere a placeholder is a token like any other;
    `image_I` as in `MicroBatch`. Errors: ValueError where placeholders and images do not match, and for video.
    """
    if (tokens_T[in_prompt_T] == model.video_token).any():
        raise ValueError("a prompt holds video placeholders, and Tora trains on images and text alone")
    sizes_I2 = pixels.grid_IT[:, 1:][image_I] // model.visual.merge
    counts_I = sizes_I2.prod(1)
    where_M = np.flatnonzero(in_prompt_T & (tokens_T == model.image_token))
    if len(where_M) != counts_I.sum():
        raise ValueError(f"prompts hold {len(where_M)} image placeholders, their images have {counts_I.sum()} features")
    starts_I = where_M[np.cumsum(counts_I) - counts_I]
    ends_I = where_M[np.cumsum(counts_I) - 1]
    if (ends_I - starts_I + 1 != counts_I).any():
        raise ValueError("a run of image placeholders in a prompt is not as long as its image has features")
    positions_3T = multimodal_positions(positions_T, document_T, starts_I, sizes_I2)
    features = (pixels.grid_IT[:, 1:] // model.visual.merge).prod(1)
    first = np.cumsum(features) - features
    feature_M = np.concatenate([[], *(first[i] + np.arange(n) for i, n in zip(image_I, counts_I, strict=True))])
    inputs = ImageInputs(
        patches_ND=torch.from_numpy(pixels.patches_ND).to(device, model.visual.pos_embed.weight.dtype),
        layout=vision_layout(pixels.grid_IT, merge=model.visual.merge, side=model.visual.side, device=device),
        where_M=torch.from_numpy(where_M).to(device),
        feature_M=torch.from_numpy(feature_M.astype(np.int64)).to(device),
    )
    return inputs, positions_3T


def unseen_image(model: Qwen3VL, device: torch.device) -> ImageInputs:
    """The smallest image, blank and in no place. With it the tower takes part in a forward and backward, as it must on
    every rank that shares its weights, and gets gradients of zero."""
    merge = model.visual.merge
    grid_IT = np.array([[1, merge, merge]])
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    return ImageInputs(
        patches_ND=torch.zeros(merge**2, model.visual.patch_numel, device=device),
        layout=vision_layout(grid_IT, merge=merge, side=model.visual.side, device=device),
        where_M=nowhere,
        feature_M=nowhere,
    )
