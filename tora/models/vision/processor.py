"""The model's own Hugging Face image processor: pixels for the model, and prompts with expanded placeholders.

Only encoded image files are sent between processes; the learner and the rollout engine each compute the pixels.
Shape letters: I images, N patches of all images, D values of a patch, T the 3 axes time, height and width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tora.errors import ConfigError, first_line
from tora.models.chat import render

if TYPE_CHECKING:
    from PIL.Image import Image

_CONFIGS = ("preprocessor_config.json", "processor_config.json")
_SIZE_KEYS = ("shortest_edge", "longest_edge")
"""Despite their names, the minimum and maximum number of pixels in all processors of the Qwen-VL families."""

_KEPT = 64
"""Images whose replacements are kept: those of a few groups."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """What a vision tower takes for a list of images."""

    tensors: dict[str, Any]
    """The processor's own, on the CPU, all images concatenated."""
    counts_I: np.ndarray
    """int64: features of each image, which are as many placeholders."""
    merge: int = 1
    """Of a processor of the Qwen-VL families, merge x merge patches become one feature."""

    @property
    def patches_ND(self) -> np.ndarray:
        """float32, normalised, all images concatenated; D = channels * frames * patch height * patch width."""
        return self.tensors["pixel_values"].numpy()

    @property
    def grid_IT(self) -> np.ndarray:
        """int64 [I, 3], of the Qwen-VL families: frames (always 1), rows and columns of each image, in patches."""
        return self.tensors["image_grid_thw"].numpy()

    @property
    def sizes_I2(self) -> np.ndarray:
        """int64, of the Qwen-VL families: rows and columns of each image, in features."""
        return self.grid_IT[:, 1:] // self.merge


class ImageProcessor:
    """One model's processor, with the same pixel limit wherever it is used.

    In a prompt's text each image has one mark, which the processor replaces: by a run of placeholders, one for each
    feature, and in some families by marks of rows, columns or ends around them.
    """

    def __init__(self, folder: Path, max_pixels: int | None = None) -> None:
        """`max_pixels`: larger images are scaled down to at most this many pixels; None means the folder's limit.

        Raises ConfigError if the folder has no image processor that can be used, or if `max_pixels` is below the
        processor's minimum, or not for it to choose.
        """
        if not has_image_processor(folder):
            raise ConfigError(f"model.path {str(folder)!r} holds no image processor, {' or '.join(_CONFIGS)}")
        processor = _load(folder)
        self._whole = processor
        self._processor = processor.image_processor
        self._tokenizer = processor.tokenizer
        self.template: str | None = processor.chat_template or processor.tokenizer.chat_template
        self._mark: str = processor.image_token
        self.image_token_id: int = processor.image_token_ids[0]
        self._video_token_id: int | None = getattr(processor, "video_token_id", None)
        self._counts_patches = hasattr(self._processor, "get_number_of_image_patches") and hasattr(
            self._processor, "merge_size"
        )
        self._size: dict[str, int] | None = self._limits(max_pixels) if self._counts_patches else None
        if not self._counts_patches and max_pixels is not None:
            raise ConfigError(
                f"rollout.max_pixels={max_pixels} is for models of the Qwen-VL families; "
                f"{type(self._processor).__name__} has one size of its own"
            )
        self._newest: dict[bytes, str] = {}

    def _limits(self, max_pixels: int | None) -> dict[str, int]:
        least, most = (int(self._processor.size[key]) for key in _SIZE_KEYS)
        if max_pixels is not None and max_pixels < least:
            raise ConfigError(f"rollout.max_pixels={max_pixels} is below the model's smallest image, {least} pixels")
        return dict(zip(_SIZE_KEYS, (least, max_pixels or most), strict=True))

    def pixels(self, images: Sequence[bytes]) -> Pixels:
        """The pixels of one or more encoded image files. Raises ValueError if a file is not an image or the
        processor rejects its aspect ratio."""
        output = self._run(images)
        tensors = {key: value for key, value in output.items() if hasattr(value, "numpy")}
        merge = self._processor.merge_size if self._counts_patches else 1
        if self._counts_patches:
            return Pixels(tensors, tensors["image_grid_thw"].prod(1).numpy() // merge**2, merge)
        marks = [self._whole.replace_image_token(output, index) for index in range(len(images))]
        return Pixels(tensors, np.array([self._num_placeholders(mark) for mark in marks]))

    def _run(self, images: Sequence[bytes]) -> Any:
        pictures: Any = [decode(image) for image in images]
        if self._size is not None:
            return self._processor(images=pictures, size=self._size, return_tensors="pt")
        rows: dict[str, Any] = {}
        if hasattr(self._processor, "return_row_col_info"):  # it shows an image in pieces, of one list for a prompt
            rows, pictures = {"return_row_col_info": True}, [pictures]
        return self._processor(images=pictures, return_tensors="pt", **rows)

    def _replacement(self, image: bytes) -> str:
        """The text that stands for an image in place of its mark."""
        kept = self._newest.get(image)  # another thread may clear them
        if kept is not None:
            return kept
        made = self._make_replacement(image)
        if len(self._newest) >= _KEPT:
            self._newest.clear()
        self._newest[image] = made
        return made

    def _make_replacement(self, image: bytes) -> str:
        if not self._counts_patches:
            return self._whole.replace_image_token(self._run([image]), 0)
        width, height = decode(image).size
        least, most = (self._size[key] for key in _SIZE_KEYS) if self._size else (0, 0)
        limits = {"min_pixels": least, "max_pixels": most}
        patches = self._processor.get_number_of_image_patches(height, width, limits)
        return self._mark * (patches // self._processor.merge_size**2)

    def _num_placeholders(self, text: str) -> int:
        return [*self._ids(text)].count(self.image_token_id)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def num_tokens(self, image: bytes) -> int:
        """The number of an image's features, each one placeholder of the prompt. Raises ValueError as `pixels` does."""
        return self._num_placeholders(self._replacement(image))

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[bytes],
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of chat messages in which the parts `{"type": "image"}` stand for `images`, in order. `variables`:
        the chat template's.

        Includes the generation prompt. Raises ConfigError if there is no chat template, the numbers of marks and images
        differ, or there is a video; ValueError as `pixels` does.
        """
        if self.template is None:
            raise ConfigError(
                "a vision model's prompts are chat messages, but its folder has no chat template; "
                "name a file that has one in chat_template"
            )
        return self.tokens(render(self._tokenizer, messages, self.template, variables or {}), images)

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for images and videos."""
        video = () if self._video_token_id is None else (self._video_token_id,)
        return (self.image_token_id, *video)

    def tokens(self, text: str, images: Sequence[bytes]) -> tuple[int, ...]:
        """Token ids of a text with each image's mark replaced. Raises as `encode` does."""
        parts = text.split(self._mark)
        if self._video_token_id is not None and self._video_token_id in self._ids(text):
            raise ConfigError("its prompt has a video placeholder; only text and images are supported")
        if len(parts) - 1 != len(images):
            raise ConfigError(f"its prompt has {len(parts) - 1} image placeholders, but there are {len(images)} images")
        shown = [self._replacement(image) for image in images]
        return tuple(self._ids("".join(chain(*zip(parts, [*shown, ""], strict=True)))))

    def model_inputs(self, text: str, images: Sequence[bytes]) -> dict[str, Any]:
        """What the model's own forward takes for one prompt, by the processor's own call."""
        pictures = [[decode(image) for image in images]]
        size = {} if self._size is None else {"size": self._size}
        made = self._whole(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False, **size)
        return dict(made)

    def inputs_for(self, ids_1L: Any, images: Sequence[bytes]) -> dict[str, Any]:
        """`model_inputs` for token ids that are a tensor already, and for any number of rows that share the images."""
        if not images:
            return {"input_ids": ids_1L}
        inputs = self.model_inputs(" ".join([self._mark] * len(images)), images)
        del inputs["attention_mask"]
        kinds = {kind for kind in ("token_type_ids", "mm_token_type_ids") if kind in inputs}
        return {**inputs, **dict.fromkeys(kinds, (ids_1L == self.image_token_id).int()), "input_ids": ids_1L}

    @property
    def mark(self) -> str:
        """What stands for an image in the text of a prompt."""
        return self._mark


def _load(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except (ImportError, OSError, ValueError) as error:  # a package or a file is missing, or a value in one is odd
        raise ConfigError(f"the processor of {str(folder)!r} cannot be loaded: {first_line(error)}") from error


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
