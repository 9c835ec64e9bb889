"""Images in chat parts: taken out of them, and encoded as files."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tora.errors import ConfigError, nearest
from tora.models.vision.encoded_image import EncodedImage

PLACEHOLDER = {"type": "image"}
_PAYLOADS = ("image", "image_url", "url", "path")
IMAGE_TYPES = ("image", "image_url")
NO_VIDEOS = "prompts may have text and images, but no videos"


def without_images(
    content: Sequence[dict[str, Any]], left: Iterator[EncodedImage], images: list[bytes]
) -> list[dict[str, Any]]:
    """A message's parts with bare placeholders. Appends their images, from the parts or next in `left`, to `images`.

    Raises ConfigError, as a clause about the prompt, if a part is neither text nor an image or has no image.
    """
    parts = []
    for part in content:
        kind = part.get("type") or ("text" if "text" in part else None)
        if kind in IMAGE_TYPES:
            images.append(_image_of(part, left))
            part = PLACEHOLDER
        elif kind != "text":
            reason = (
                NO_VIDEOS if "video" in str(kind) else nearest(str(kind), ("text", *IMAGE_TYPES)).removeprefix("; ")
            )
            raise ConfigError(f"its prompt has a part of type {kind!r}; {reason}")
        parts.append(part)
    return parts


def encoded(image: Any) -> EncodedImage:
    """The encoded bytes of an image that is given as bytes, a path, a data URL, a Pillow image or a `datasets` image.

    Raises ConfigError if it is anything else, a missing file or a web address.
    """
    if isinstance(image, EncodedImage):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        return EncodedImage(image)
    if isinstance(image, Mapping):  # the `Image` feature of `datasets`: `bytes` and `path`, one of which may be null
        return encoded(next((image[key] for key in ("bytes", "path") if image.get(key) is not None), None))
    if isinstance(image, str) and image.startswith("data:"):
        return _of_data_url(image)
    if isinstance(image, str) and image.startswith("file://"):
        return encoded(unquote(urlsplit(image).path))
    if isinstance(image, str) and "://" in image:
        raise ConfigError(f"image {image[:80]!r} is on the web; Tora reads only local files, so download it first")
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        if not path.is_file():
            raise ConfigError(f"image {str(image)[:200]!r} is not a file")
        return EncodedImage(path.read_bytes())
    if hasattr(image, "convert") and hasattr(image, "save"):
        return _png(image)
    raise ConfigError(f"an image has type {type(image).__name__}, expected bytes, a path, a data URL or a Pillow image")


def _image_of(part: dict[str, Any], left: Iterator[EncodedImage]) -> EncodedImage:
    if part.get("base64") is not None:
        return _of_base64(part["base64"])
    given = next((part[key] for key in _PAYLOADS if part.get(key) is not None), None)
    if given is not None:
        is_openai = isinstance(given, Mapping) and "url" in given
        return encoded(given["url"] if is_openai else given)
    image = next(left, None)
    if image is None:
        raise ConfigError("its prompt has more placeholders than it has images")
    return image


def _of_data_url(url: str) -> EncodedImage:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ConfigError(f"image {url[:40]!r} is not of the form data:image/png;base64,...")
    return _of_base64(data)


def _of_base64(data: str) -> EncodedImage:
    try:
        return EncodedImage(base64.b64decode(data, validate=True))
    except binascii.Error as error:
        raise ConfigError(f"image {data[:40]!r} is not base64: {error}") from error


def _png(image: Any) -> EncodedImage:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)  # PNG files of Pillow's have no orientation
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return EncodedImage(buffer.getvalue())
