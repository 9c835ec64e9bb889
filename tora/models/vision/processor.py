"""The model's own Hugging Face image processor: pixels for the model, and prompts with expanded placeholders.

Only encoded image files are sent between processes; the learner and the rollout engine each compute the pixels.
Shape letters: I images, N patches of all images, D values of a patch, T the 3 axes time, height and width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tora.errors import ConfigError
from tora.models.chat import render

if TYPE_CHECKING:
    from PIL.Image import Image

_CONFIGS = ("preprocessor_config.json", "processor_config.json")
_SIZE_KEYS = ("shortest_edge", "longest_edge")
"""Despite their names, the minimum and maximum number of pixels in all processors of the Qwen-VL families."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """The vision tower's input for a list of images."""

    patches_ND: np.ndarray
    """float32, normalised, all images concatenated; D = channels * frames * patch height * patch width."""
    grid_IT: np.ndarray
    """int64 [I, 3]: frames (always 1), rows and columns of each image, in patches."""


class ImageProcessor:
    """One model's processor, with the same pixel limit wherever it is used."""

    def __init__(self, folder: Path, max_pixels: int | None = None) -> None:
        """`max_pixels`: larger images are scaled down to at most this many pixels; None means the folder's limit.

        Raises ConfigError if the folder has no image processor, or if `max_pixels` is below the processor's minimum.
        """
        if not has_image_processor(folder):
            raise ConfigError(f"model.path {str(folder)!r} holds no image processor, {' or '.join(_CONFIGS)}")
        from transformers import AutoProcessor

        processor: Any = AutoProcessor.from_pretrained(folder)
        self._processor = processor.image_processor
        self._tokenizer = processor.tokenizer
        self.template: str | None = processor.chat_template or processor.tokenizer.chat_template
        self.image_token_id: int = processor.image_token_id
        self._video_token_id: int = processor.video_token_id
        least, most = (int(self._processor.size[key]) for key in _SIZE_KEYS)
        if max_pixels is not None and max_pixels < least:
            raise ConfigError(f"rollout.max_pixels={max_pixels} is below the model's smallest image, {least} pixels")
        self._size = dict(zip(_SIZE_KEYS, (least, max_pixels or most), strict=True))

    def pixels(self, images: Sequence[bytes]) -> Pixels:
        """The pixels of one or more encoded image files. Raises ValueError if a file is not an image or the
        processor rejects its aspect ratio."""
        output = self._processor(images=[decode(image) for image in images], size=self._size, return_tensors="pt")
        return Pixels(output["pixel_values"].numpy(), output["image_grid_thw"].numpy())

    def num_tokens(self, image: bytes) -> int:
        """The number of merged patches, each one token of the prompt. Raises ValueError as `pixels` does."""
        width, height = decode(image).size
        least, most = (self._size[key] for key in _SIZE_KEYS)
        limits = {"min_pixels": least, "max_pixels": most}
        return self._processor.get_number_of_image_patches(height, width, limits) // self._processor.merge_size**2

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[bytes],
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of chat messages in which the parts `{"type": "image"}` stand for `images`, in order. `variables`:
        the chat template's.

        Includes the generation prompt; each placeholder is repeated to its image's number of tokens.
        Raises ConfigError if there is no chat template, the numbers of placeholders and images differ, or there is a
        video; ValueError as `pixels` does.
        """
        if self.template is None:
            raise ConfigError("a vision model's prompts are chat messages, but its folder has no chat template")
        text = render(self._tokenizer, messages, self.template, variables or {})
        return self.expand(self._tokenizer(text, add_special_tokens=False)["input_ids"], images)

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for images and videos."""
        return self.image_token_id, self._video_token_id

    def expand(self, ids: Sequence[int], images: Sequence[bytes]) -> tuple[int, ...]:
        """The ids with each placeholder repeated to its image's number of tokens. Raises as `encode` does."""
        if self._video_token_id in ids:
            raise ConfigError("its prompt has a video placeholder; only text and images are supported")
        found = [*ids].count(self.image_token_id)
        if found != len(images):
            raise ConfigError(f"its prompt has {found} image placeholders, but there are {len(images)} images")
        counts = (self.num_tokens(image) for image in images)
        return tuple(token for t in ids for token in ([t] * next(counts) if t == self.image_token_id else [t]))


def has_image_processor(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a model that takes images: its config has a vision tower, and the folder
    describes how images are prepared. Raises ConfigError if that description is missing."""
    if not _has_vision_tower(folder):
        return False  # a stray preprocessor_config.json beside a text model changes nothing
    if any((folder / name).is_file() for name in _CONFIGS):
        return True
    raise ConfigError(
        f"model.path {str(folder)!r} takes images but holds neither {' nor '.join(_CONFIGS)}; copy it from the model's "
        "page"
    )


def _has_vision_tower(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False  # reported where the model is loaded
    return isinstance(config, dict) and "vision_config" in config


def decode(image: bytes) -> Image:
    """Decode an image file to RGB, rotated by its EXIF orientation, with transparency composed on white.

    Raises ValueError if Pillow cannot read it.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = _in_8_bits(ImageOps.exif_transpose(Image.open(io.BytesIO(image))))
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image of {len(image)} bytes cannot be read: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _in_8_bits(picture: Image) -> Image:
    """A picture of 16-bit samples scaled to 8 bits, which Pillow's own conversion clips. Raises ValueError for one of
    32-bit floats, whose range is unknown."""
    if picture.mode == "F":
        raise ValueError("an image has 32-bit float samples; save it with 8 bits per channel")
    if not picture.mode.startswith("I"):
        return picture
    from PIL import Image

    samples = np.asarray(picture).astype(np.int64)
    if samples.size and (samples.min() < 0 or samples.max() > 65535):
        raise ValueError("an image has 32-bit samples; save it with 8 or 16 bits per channel")
    return Image.fromarray((samples >> 8).astype(np.uint8))
