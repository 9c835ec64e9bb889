"""Large images in Ray's object store. The driver puts an image there once, with the prompt that first needs it; the
prompt's worker and the learner ranks each read that copy, which is freed when the driver has no use for the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from tora.batching.image_ref import fetched
from tora.models.vision.encoded_image import EncodedImage
from tora.types import Prompt, TrainBatch

LEAST_BYTES = 100 << 10
"""As large as an argument has to be for Ray to put it into the store by itself. Others travel with their message."""


def store(images: Sequence[bytes]) -> list[Any]:
    """Each image, or Ray's reference to it if it is large."""
    large = any(len(image) >= LEAST_BYTES for image in images)
    here = _cluster() if large else ""
    return [_reference(image, here) if len(image) >= LEAST_BYTES else image for image in images]


def stored(make: Callable[[], Prompt]) -> Prompt:
    """What `make` returns. Its images are stored, so that whoever sends it need not wait for that."""
    prompt = make()
    store(prompt.images)
    return prompt


def _reference(image: bytes, here: str) -> Any:
    import ray

    if not isinstance(image, EncodedImage):
        return image
    if image.stored is None or image.stored[0] != here:
        image.stored = here, ray.put(image)
    return image.stored[1]


def _cluster() -> str:
    """Names this process's connection to a cluster. References do not outlive it."""
    import ray

    context = ray.get_runtime_context()
    return context.get_node_id() + context.get_job_id()


StoredBatch = tuple[TrainBatch, list[list[Any]]]
"""A batch without images, and for each micro-batch what `store` says of its images."""


def without_images(batch: TrainBatch) -> StoredBatch:
    micro_batches = tuple(replace(each, images=()) for each in batch.micro_batches)
    return replace(batch, micro_batches=micro_batches), [store(each.images) for each in batch.micro_batches]


def with_images(bare: StoredBatch) -> TrainBatch:
    """Raises Ray's ObjectLostError if an image is on no node any more, and as `fetched`."""
    batch, images = bare
    read = iter(_read([image for shown in images for image in shown]))
    micro_batches = zip(batch.micro_batches, images, strict=True)
    whole = tuple(replace(each, images=tuple(islice(read, len(shown)))) for each, shown in micro_batches)
    return replace(batch, micro_batches=whole)


def _read(images: Sequence[Any]) -> tuple[bytes, ...]:
    import ray

    references = list({image for image in images if isinstance(image, ray.ObjectRef)})
    found = dict(zip(references, ray.get(references), strict=True))
    return fetched([found[image] if isinstance(image, ray.ObjectRef) else image for image in images])
