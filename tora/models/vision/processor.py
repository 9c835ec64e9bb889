"""Images by the model's own Hugging Face processor: pixels for the model, and prompts with their placeholders expanded.

The learner and the rollout engine each make pixels from the same encoded bytes, which are all that travels.
Shape letters: I images, N patches of all of them, D values of a patch, T the image's time, height and width in patches.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tora.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

_CONFIGS = ("preprocessor_config.json", "processor_config.json")
_SIZE_KEYS = ("shortest_edge", "longest_edge")
"""Numbers of pixels, whatever they are called, in every processor of the Qwen-VL families."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """What the vision tower takes."""

    patches_ND: np.ndarray
    """float32, normalised; D = channels * frames * patch height * patch width. All images' patches end to end."""
    grid_IT: np.ndarray
    """int64 [I, 3]: frames (1), rows and columns of patches of each image."""


class ImageProcessor:
    """One model's processor, with one limit on pixels for everybody who uses it."""

    def __init__(self, folder: Path, max_pixels: int | None = None) -> None:
        """`max_pixels`: larger images are scaled down to at most this many; the folder's own limit where None.

        Errors: ConfigError where the folder has no image processor, or `max_pixels` is below its smallest image.
        """
        if not has_image_processor(folder):
            raise ConfigError(f"model.path {str(folder)!r} holds no image processor, {' or '.join(_CONFIGS)}")
        from transformers import AutoProcessor

        processor: Any = AutoProcessor.from_pretrained(folder)
        self._processor = processor.image_processor
        self._tokenizer = processor.tokenizer
        self._template = processor.chat_template or processor.tokenizer.chat_template
        self.image_token_id: int = processor.image_token_id
        self._video_token_id: int = processor.video_token_id
        least, most = (int(self._processor.size[key]) for key in _SIZE_KEYS)
        if max_pixels is not None and max_pixels < least:
            raise ConfigError(f"rollout.max_pixels={max_pixels} is below the model's smallest image, {least} pixels")
        self._size = dict(zip(_SIZE_KEYS, (least, max_pixels or most), strict=True))

    def pixels(self, images: Sequence[bytes]) -> Pixels:
        """Of encoded image files, at least one. Errors: ValueError for what is no image or has an impossible shape."""
        output = self._processor(images=[decode(image) for image in images], size=self._size, return_tensors="pt")
        return Pixels(output["pixel_values"].numpy(), output["image_grid_thw"].numpy())

    def num_tokens(self, image: bytes) -> int:
        """Merged patches, each of which is one token of the prompt. Errors: ValueError as for `pixels`."""
        width, height = decode(image).size
        least, most = (self._size[key] for key in _SIZE_KEYS)
        limits = {"min_pixels": least, "max_pixels": most}
        return self._processor.get_number_of_image_patches(height, width, limits) // self._processor.merge_size**2

    def encode(self, messages: Sequence[dict[str, Any]], images: Sequence[bytes]) -> tuple[int, ...]:
        """Token ids of chat messages whose parts `{"type": "image"}` stand for `images`, in this order.

        The generation prompt is included, and each placeholder repeated to its image's number of tokens.
        Errors: ConfigError without a chat template, and where its placeholders are not as many as the images;
        ValueError as for `pixels`.
        """
        if self._template is None:
            raise ConfigError("a vision model's prompts are chat messages, but its folder has no chat template")
        text = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._video_token_id in ids:
            raise ConfigError("its prompt has a video placeholder; prompts carry text and images, no videos")
        found = ids.count(self.image_token_id)
        if found != len(images):
            raise ConfigError(f"its prompt has {found} image placeholders, and there are {len(images)} images")
        counts = (self.num_tokens(image) for image in images)
        return tuple(token for t in ids for token in ([t] * next(counts) if t == self.image_token_id else [t]))


def has_image_processor(folder: Path) -> bool:
    """Whether the model of a Hugging Face folder takes images."""
    return any((folder / name).is_file() for name in _CONFIGS)


def decode(image: bytes) -> Image:
    """An encoded file as RGB, upright by its EXIF orientation, what is transparent on white.

    Errors: ValueError for what Pillow cannot read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image of {len(image)} bytes cannot be read: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
