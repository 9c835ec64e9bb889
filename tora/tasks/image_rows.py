"""Split dataset rows with images into chat messages with bare placeholders and the encoded images they stand for.

An image may be in its message, as in `{"type": "image", "image": ...}`, or in the row's column `images` or `image`. A
column's images fill the bare placeholders in order, or the tags `<image>` in the text if there are no placeholders.
Without either they go before the first user message's text.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tora.errors import ConfigError, nearest
from tora.tasks.messages import Messages, checked

_PLACEHOLDER = {"type": "image"}
_TAG = "<image>"
_PAYLOADS = ("image", "image_url", "url", "path")
_PART_TYPES = ("text", "image", "image_url")
_VIDEO = "prompts may have text and images, but no videos"


def take_images(row: dict[str, Any]) -> tuple[str | Messages, tuple[bytes, ...]]:
    """Removes `prompt` and the image columns from a row; returns the prompt with bare placeholders, and its images.

    A prompt without images is returned unchanged. Raises ConfigError if there is a video, a part of an unknown type
    or an image that cannot be read, or if a column has more or fewer images than the prompt has placeholders.
    """
    if row.pop("videos", None) or row.pop("video", None):
        raise ConfigError(f"it has a video; {_VIDEO}")
    source = row.pop("prompt")
    column = [encoded(image) for image in _column(row)]
    if isinstance(source, str):
        if not column:
            return source, ()
        source = [{"role": "user", "content": source}]
    source = checked(source)
    if column and not any(part.get("type") in _PART_TYPES[1:] for part in _parts(source)):
        source = _with_tags_as_placeholders(source)
    if column and not any(part.get("type") in _PART_TYPES[1:] for part in _parts(source)):
        source = _with_placeholders(source, len(column))
    left = iter(column)
    images: list[bytes] = []
    messages = [_without_images(message, left, images) for message in source]
    if len(rest := list(left)):
        raise ConfigError(f"its prompt has placeholders for {len(column) - len(rest)} of its {len(column)} images")
    return messages, tuple(images)


def encoded(image: Any) -> bytes:
    """The encoded bytes of an image that is given as bytes, a path, a data URL, a Pillow image or a `datasets` image.

    Raises ConfigError if it is anything else, a missing file or a web address.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
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
        return path.read_bytes()
    if hasattr(image, "convert") and hasattr(image, "save"):
        return _png(image)
    raise ConfigError(f"an image has type {type(image).__name__}, expected bytes, a path, a data URL or a Pillow image")


def _column(row: dict[str, Any]) -> list[Any]:
    images, image = row.pop("images", None), row.pop("image", None)
    if images is not None and image is not None:
        raise ConfigError("it has both a column images and a column image")
    found = image if images is None else images
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]


def _parts(messages: Messages) -> Iterator[dict[str, Any]]:
    for message in messages:
        if isinstance(message.get("content"), list):
            yield from message["content"]


def _with_tags_as_placeholders(messages: Messages) -> Messages:
    """The messages with a placeholder in the place of each `<image>` in their text, as in verl and ms-swift."""
    return [
        {**message, "content": _split_at_tags(message["content"])}
        if isinstance(message.get("content"), str) and _TAG in message["content"]
        else message
        for message in messages
    ]


def _split_at_tags(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(_TAG)):
        parts += [_PLACEHOLDER] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _with_placeholders(messages: Messages, count: int) -> Messages:
    """The messages with `count` placeholders before the first user message's content, as in TRL."""
    for i, message in enumerate(messages):
        if message.get("role") == "user":
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            return [*messages[:i], {**message, "content": [_PLACEHOLDER] * count + parts}, *messages[i + 1 :]]
    raise ConfigError("it has images but no user message")


def _without_images(message: dict[str, Any], left: Iterator[bytes], images: list[bytes]) -> dict[str, Any]:
    """The message with bare placeholders. Appends their images, from the message or next in `left`, to `images`."""
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        kind = part.get("type") or ("text" if "text" in part else None)
        if kind in ("image", "image_url"):
            images.append(_image_of(part, left))
            part = _PLACEHOLDER
        elif kind != "text":
            reason = _VIDEO if "video" in str(kind) else nearest(str(kind), _PART_TYPES).removeprefix("; ")
            raise ConfigError(f"its prompt has a part of type {kind!r}; {reason}")
        parts.append(part)
    return {**message, "content": parts}


def _image_of(part: dict[str, Any], left: Iterator[bytes]) -> bytes:
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


def _of_data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ConfigError(f"image {url[:40]!r} is not of the form data:image/png;base64,...")
    return _of_base64(data)


def _of_base64(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ConfigError(f"image {data[:40]!r} is not base64: {error}") from error


def _png(image: Any) -> bytes:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)  # PNG files of Pillow's have no orientation
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
