"""What an environment shows the policy: text, or, to a model that takes images, text and images.

As in TRL, a tool or `reset` may return a list of chat parts, `{"type": "text", "text": ...}` and
`{"type": "image", "image": ...}`. A single image may be returned by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tora.tasks.image_rows import encoded, take_images

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


def content_of(value: Any) -> Content | None:
    """An image or a list of chat parts as content; None if it is neither. Raises ValueError if a part cannot be
    shown."""
    if hasattr(value, "convert") and hasattr(value, "save"):
        return Content([{"type": "image"}], (encoded(value),))
    if not isinstance(value, list) or not value or not all(isinstance(p, dict) and "type" in p for p in value):
        return None
    prompt, images = take_images({"prompt": [{"role": "tool", "content": value}]})
    assert not isinstance(prompt, str)
    return Content(prompt[0]["content"], images)
