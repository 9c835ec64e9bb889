"""Images that the prompt process keeps (`actors.prompt_process`): what stands for them, and how to get them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from tora.errors import ImageLost, first_line

_DIGEST_BYTES = 16


class Place(NamedTuple):
    """Where an image is."""

    keeper: str
    """Name of the Ray actor that keeps it."""
    prompt_id: int
    number: int
    """Which of the prompt's images it is."""
    digest: bytes


class ImageRef(bytes):
    """Stands for an image that is elsewhere. As bytes it is the image's digest, so references to equal images are
    equal, and a batch has one of them."""

    place: Place
    hold: object = None
    """Lives as long as this process has use for the image. Not sent along."""

    def __new__(cls, place: Place) -> ImageRef:
        self = super().__new__(cls, place.digest)
        self.place = place
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return ImageRef, (self.place,)


def digest_of(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=_DIGEST_BYTES).digest()


def fetched(images: Sequence[bytes]) -> tuple[bytes, ...]:
    """The images, those that are elsewhere read from there, each once.

    Raises ImageLost if one cannot be read, and ConfigError if a dataset has another image in the place of one that was
    lost.
    """
    places = {image.place: None for image in images if isinstance(image, ImageRef)}
    if not places:
        return tuple(images)
    found: dict[Place, bytes] = {}
    for keeper in {place.keeper for place in places}:
        found |= _of_keeper(keeper, [place for place in places if place.keeper == keeper])
    return tuple(found[image.place] if isinstance(image, ImageRef) else image for image in images)


_TRIES = 3
"""An image is lost with the process that keeps it, between its answer and our reading. The next one has it again."""


def _of_keeper(keeper: str, places: list[Place]) -> dict[Place, bytes]:
    import ray
    from ray.exceptions import ObjectLostError, RayError, RayTaskError

    for left in reversed(range(_TRIES)):
        try:
            kept = ray.get(_actor(keeper).images.remote(places))
            stored = [image for image in kept if isinstance(image, ray.ObjectRef)]
            read = dict(zip(stored, ray.get(stored), strict=True))
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except (RayError, ValueError) as error:  # Ray's answer for a name that nobody has is a ValueError
            if left and isinstance(error, ObjectLostError):
                continue
            raise ImageLost(f"images of prompt {places[0].prompt_id} are lost ({first_line(error)})") from error
        images = (read[image] if isinstance(image, ray.ObjectRef) else image for image in kept)
        return dict(zip(places, images, strict=True))
    raise AssertionError


@lru_cache(maxsize=8)
def _actor(name: str) -> Any:
    import ray

    return ray.get_actor(name)
