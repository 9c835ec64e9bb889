"""What an environment shows the policy: text, or, to a model that takes images, text and images.

As in TRL, a tool or `reset` may return a list of chat parts, `{"type": "text", "text": ...}` and
`{"type": "image", "image": ...}`. A single image may be returned by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tora.models.vision.parts import encoded, without_images

Parts = list[dict[str, Any]]
"""Chat parts, in which `{"type": "image"}` stands for the next image."""


@dataclass(frozen=True, slots=True)
class Content:
    parts: str | Parts
    images: tuple[bytes, ...] = ()
    """Encoded, one for each placeholder."""

    @property
    def text(self) -> str:
        return self.parts if isinstance(self.parts, str) else "".join(part.get("text", "") for part in self.parts)


_LONGEST = 1_000_000
"""Characters: far more than fit into any episode, few enough to be tokenised in a second."""


def text_content(text: str) -> Content:
    """Text that a tokenizer takes. Raises ValueError if it is absurdly long."""
    if len(text) > _LONGEST:
        raise ValueError(f"the answer has {len(text):,} characters, more than {_LONGEST:,}")
    return Content(text.encode("utf-8", "replace").decode())  # lone surrogates become question marks


def content_of(value: Any) -> Content | None:
    """An image or a list of chat parts as content; None if it is neither. Raises ValueError if a part cannot be
    shown."""
    if hasattr(value, "convert") and hasattr(value, "save"):
        return Content([{"type": "image"}], (encoded(value),))
    if not isinstance(value, list) or not value or not all(isinstance(p, dict) and "type" in p for p in value):
        return None
    images: list[bytes] = []
    parts = without_images(value, iter(()), images)
    shown = [part if "text" not in part else {**part, "text": text_content(str(part["text"])).parts} for part in parts]
    return Content(shown, tuple(images))
