"""A vision model's inputs, from packed tokens and the pixels of their images.

Shape letters: T packed tokens, I runs of placeholders (one run per image shown), M placeholders, N patches, D values of
a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tora.models.base import Decoder
from tora.models.vision.layout import VisionLayout, vision_layout
from tora.models.vision.mrope import multimodal_positions
from tora.models.vision.processor import ImageProcessor, Pixels
from tora.models.vision.qwen3_vl import ImageInputs, Qwen3VL


class ImageReader:
    """Reads images with the model's image processor, which is loaded when the first images arrive."""

    def __init__(self, model: Decoder, processor: Callable[[], ImageProcessor] | None, device: torch.device) -> None:
        """`processor` loads it; None if prompts are text only."""
        self._model, self._load, self._device = model, processor, device
        self._processor: ImageProcessor | None = None

    def __call__(self, images: Sequence[bytes], **tokens: np.ndarray) -> tuple[ImageInputs, np.ndarray]:
        """`image_inputs` for distinct encoded images; `tokens` are its keyword arguments. Raises ValueError as it does,
        and if the model takes no images."""
        if not isinstance(self._model, Qwen3VL) or self._load is None:
            raise ValueError("prompts have images, but the model takes none")
        if self._processor is None:
            self._processor = self._load()
        return image_inputs(self._model, self._processor.pixels(images), device=self._device, **tokens)

    def shows_image(self, token_ids: Sequence[int], count: int) -> np.ndarray:
        """See `shows_image`. Of a model that takes no images: nowhere."""
        token = self._model.image_token if isinstance(self._model, Qwen3VL) else -1
        return shows_image(token_ids, token, count)


def image_inputs(
    model: Qwen3VL,
    pixels: Pixels,
    *,
    tokens_T: np.ndarray,
    positions_T: np.ndarray,
    document_T: np.ndarray,
    given_T: np.ndarray,
    image_I: np.ndarray,
    device: torch.device,
    branch_T: np.ndarray | None = None,
) -> tuple[ImageInputs, np.ndarray]:
    """The inputs for the distinct images in `pixels`, and the tokens' positions, [3, T] int64.

    `tokens_T`, `positions_T`, `given_T` and `image_I` as in `MicroBatch`: only a given placeholder stands for an image.
    `document_T` and `branch_T` as in `multimodal_positions`. Raises ValueError if placeholders and images do not match,
    or there are video placeholders.
    """
    if (tokens_T[given_T] == model.video_token).any():
        raise ValueError("a prompt has video placeholders, but Tora trains on text and images only")
    sizes_I2 = pixels.grid_IT[:, 1:][image_I] // model.visual.merge
    counts_I = sizes_I2.prod(1)
    index_M = np.flatnonzero(given_T & (tokens_T == model.image_token))
    if len(index_M) != counts_I.sum():
        raise ValueError(
            f"prompts hold {len(index_M)} image placeholders, but their images have {counts_I.sum()} features"
        )
    starts_I = index_M[np.cumsum(counts_I) - counts_I]
    ends_I = index_M[np.cumsum(counts_I) - 1]
    if (ends_I - starts_I + 1 != counts_I).any():
        raise ValueError("a run of image placeholders in a prompt is not as long as its image's number of features")
    positions_3T = multimodal_positions(positions_T, document_T, starts_I, sizes_I2, branch_T)
    features = (pixels.grid_IT[:, 1:] // model.visual.merge).prod(1)
    first = np.cumsum(features) - features
    feature_M = np.concatenate([[], *(first[i] + np.arange(n) for i, n in zip(image_I, counts_I, strict=True))])
    inputs = ImageInputs(
        patches_ND=torch.from_numpy(pixels.patches_ND).to(device, model.visual.pos_embed.weight.dtype),
        layout=_layout(model, pixels.grid_IT, device),
        index_M=torch.from_numpy(index_M).to(device),
        feature_M=torch.from_numpy(feature_M.astype(np.int64)).to(device),
    )
    return inputs, positions_3T


def shows_image(token_ids: Sequence[int], image_token: int, count: int) -> np.ndarray:
    """[L] bool: the first `count` runs of placeholders, which stand for images. Later ones were sampled."""
    is_image_L = np.asarray(token_ids) == image_token
    begins_L = is_image_L & ~np.concatenate([[False], is_image_L[:-1]])
    return is_image_L & (np.cumsum(begins_L) <= count)


def dummy_image(model: Qwen3VL, device: torch.device) -> ImageInputs:
    """The smallest image, blank, without placeholders. It makes the tower take part in forward and backward with zero
    gradients, as it must on every rank if its weights are sharded."""
    merge = model.visual.merge
    grid_IT = np.array([[1, merge, merge]])
    no_index = torch.empty(0, dtype=torch.int64, device=device)
    return ImageInputs(
        patches_ND=torch.zeros(merge**2, model.visual.patch_numel, device=device),
        layout=_layout(model, grid_IT, device),
        index_M=no_index,
        feature_M=no_index,
    )


def _layout(model: Qwen3VL, grid_IT: np.ndarray, device: torch.device) -> VisionLayout:
    tower, dtype = model.visual, model.embedding.dtype
    return vision_layout(grid_IT, merge=tower.merge, side=tower.side, device=device, dtype=dtype)
