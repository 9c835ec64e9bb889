"""A vision model's inputs, from packed tokens and the pixels of their images.

Shape letters: T packed tokens, I images shown, M placeholders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tora.models.base import Decoder
from tora.models.vision.mrope import multimodal_positions
from tora.models.vision.places import Places
from tora.models.vision.processor import ImageProcessor, Pixels


class ImageReader:
    """Reads images with the model's image processor, which is loaded when the first images arrive."""

    def __init__(self, model: Decoder, processor: Callable[[], ImageProcessor] | None, device: torch.device) -> None:
        """`processor` loads it; None if prompts are text only."""
        self._model, self._load, self._device = model, processor, device
        self._loaded: ImageProcessor | None = None

    @property
    def _processor(self) -> ImageProcessor:
        if self._model.image_token is None or self._load is None:
            raise ValueError("prompts have images, but the model takes none")
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def __call__(self, images: Sequence[bytes], **tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        """`image_inputs` for distinct encoded images; `tokens` are its keyword arguments. Raises ValueError as it does,
        and if the model takes no images."""
        return image_inputs(self._model, self._processor.pixels(images), device=self._device, **tokens)

    def shows_image(self, token_ids: Sequence[int], images: Sequence[bytes]) -> np.ndarray:
        """[L] bool: the placeholders that stand for `images`, which come first. Later ones were sampled."""
        count = sum(self._processor.num_tokens(image) for image in images)
        is_image_L = np.asarray(token_ids) == self._model.image_token
        return is_image_L & (np.cumsum(is_image_L) <= count)

    def blank(self) -> Any:
        """A blank image without placeholders. It makes the tower take part in forward and backward with zero gradients,
        as it must on every rank if its weights are sharded."""
        return self._model.image_inputs(self._processor.pixels([_BLANK]), Places.none(), self._device)


_BLANK = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63f80f0001010100b138f6140000000049454e44ae426082"
)
"""A PNG of one white pixel."""


def image_inputs(
    model: Decoder,
    pixels: Pixels,
    *,
    tokens_T: np.ndarray,
    positions_T: np.ndarray,
    document_T: np.ndarray,
    given_T: np.ndarray,
    image_I: np.ndarray,
    device: torch.device,
    branch_T: np.ndarray | None = None,
) -> tuple[Any, np.ndarray]:
    """The inputs for the distinct images in `pixels`, and the tokens' positions: `positions_T`, or [3, T] int64 of a
    model with `has_grid_positions`.

    `tokens_T`, `positions_T`, `given_T` and `image_I` as in `MicroBatch`: only a given placeholder stands for an image.
    `document_T` and `branch_T` as in `multimodal_positions`. Raises ValueError if placeholders and images do not match,
    or there are video placeholders.
    """
    if model.video_token is not None and (tokens_T[given_T] == model.video_token).any():
        raise ValueError("a prompt has video placeholders, but Tora trains on text and images only")
    counts_I = pixels.counts_I[image_I]
    index_M = np.flatnonzero(given_T & (tokens_T == model.image_token))
    if len(index_M) != counts_I.sum():
        raise ValueError(
            f"prompts hold {len(index_M)} image placeholders, but their images have {counts_I.sum()} features"
        )
    ends = np.cumsum(counts_I)
    starts_I, ends_I = index_M[ends - counts_I], index_M[ends - 1]
    follows_I = (starts_I[1:] == ends_I[:-1] + 1) & (document_T[starts_I[1:]] == document_T[ends_I[:-1]])
    if follows_I.any() or (model.has_grid_positions and (ends_I - starts_I + 1 != counts_I).any()):
        raise ValueError("a run of image placeholders in a prompt is not as long as its image's number of features")
    positions = positions_T
    if model.has_grid_positions:
        positions = multimodal_positions(positions_T, document_T, starts_I, pixels.sizes_I2[image_I], branch_T)
    first = np.cumsum(pixels.counts_I) - pixels.counts_I
    feature_M = np.concatenate([[], *(first[i] + np.arange(n) for i, n in zip(image_I, counts_I, strict=True))])
    branch_T = np.full_like(document_T, -1) if branch_T is None else branch_T
    places = Places(index_M, feature_M.astype(np.int64), positions_T, document_T, branch_T)
    return model.image_inputs(pixels, places, device), positions
