"""Split dataset rows with images into chat messages with bare placeholders and the encoded images they stand for.

An image may be in its message, as in `{"type": "image", "image": ...}`, or in the row's column `images` or `image`. A
column's images fill the bare placeholders in order, or the tags `<image>` in the text if there are no placeholders.
Without either they go before the first user message's text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tora.errors import ConfigError
from tora.models.vision.encoded_image import EncodedImage
from tora.models.vision.parts import IMAGE_TYPES, NO_VIDEOS, PLACEHOLDER, encoded, without_images
from tora.tasks.messages import Messages, checked

_TAG = "<image>"


def take_images(row: dict[str, Any]) -> tuple[str | Messages, tuple[bytes, ...]]:
    """Removes `prompt` and the image columns from a row; returns the prompt with bare placeholders, and its images.

    A prompt without images is returned unchanged. Raises ConfigError if there is a video, a part of an unknown type
    or an image that cannot be read, or if a column has more or fewer images than the prompt has placeholders.
    """
    if row.pop("videos", None) or row.pop("video", None):
        raise ConfigError(f"it has a video; {NO_VIDEOS}")
    source = row.pop("prompt")
    column = [encoded(image) for image in _column(row)]
    if isinstance(source, str):
        if not column:
            return source, ()
        source = [{"role": "user", "content": source}]
    source = checked(source)
    if column and not any(part.get("type") in IMAGE_TYPES for part in _parts(source)):
        source = _with_tags_as_placeholders(source)
    if column and not any(part.get("type") in IMAGE_TYPES for part in _parts(source)):
        source = _with_placeholders(source, len(column))
    left = iter(column)
    images: list[bytes] = []
    messages = [_without_images(message, left, images) for message in source]
    if len(rest := list(left)):
        raise ConfigError(f"its prompt has placeholders for {len(column) - len(rest)} of its {len(column)} images")
    return messages, tuple(images)


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
        parts += [PLACEHOLDER] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _with_placeholders(messages: Messages, count: int) -> Messages:
    """The messages with `count` placeholders before the first user message's content, as in TRL."""
    for i, message in enumerate(messages):
        if message.get("role") == "user":
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            return [*messages[:i], {**message, "content": [PLACEHOLDER] * count + parts}, *messages[i + 1 :]]
    raise ConfigError("it has images but no user message")


def _without_images(message: dict[str, Any], left: Iterator[EncodedImage], images: list[bytes]) -> dict[str, Any]:
    """The message with bare placeholders. Appends their images, from the message or next in `left`, to `images`."""
    content = message.get("content")
    return {**message, "content": without_images(content, left, images)} if isinstance(content, list) else message
