"""What Ray carries of a group, in the form that costs the driver least: bytes, which Ray takes as they are.

A result has one array of all rollouts where these have one each: of every array in an object Ray makes a buffer, which
took the driver 0.6 ms a group.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any

import cloudpickle
import numpy as np

from tora.batching.image_ref import ImageRef, Place, fetched
from tora.batching.stored_images import store
from tora.types import GroupResult, Prompt, Rollout

_OF_TOKENS, _OF_SAMPLED = ("token_ids", "sampled"), ("actor_logprobs", "versions")
"""The arrays of `Rollout`, [L] and [S]."""
_OTHERS = tuple(f.name for f in fields(Rollout) if f.name not in (*_OF_TOKENS, *_OF_SAMPLED))
_REST = tuple(f.name for f in fields(GroupResult) if f.name != "rollouts")
_others_of, _rest_of = attrgetter(*_OTHERS), attrgetter(*_REST)
_fields_of = attrgetter(*(f.name for f in fields(Prompt) if f.name != "images"))


def packed_call(prompt: Prompt, ticket: int) -> list[Any]:
    """The arguments of a call: the prompt's other fields and the ticket, pickled; then each image, or its place in the
    object store, from where Ray hands it to the worker. References to images elsewhere are with the fields."""
    places = [tuple(image.place) for image in prompt.images if isinstance(image, ImageRef)]
    given = [] if len(places) == len(prompt.images) else store(prompt.images)
    # builtin types, which pickle fastest
    return [cloudpickle.dumps((_fields_of(prompt), places, ticket)), *given]


def unpacked_call(pickled: bytes, *images: bytes) -> tuple[Prompt, int]:
    """The prompt with its images, and the ticket. Raises as `fetched`."""
    values, places, ticket = pickle.loads(pickled)
    return Prompt(*values, images=fetched(images or [ImageRef(Place(*place)) for place in places])), ticket


def packed(result: GroupResult) -> bytes:
    arrays = [_joined(result, names) for names in (_OF_TOKENS, _OF_SAMPLED)] if result.rollouts else []
    return cloudpickle.dumps((arrays, [_others_of(rollout) for rollout in result.rollouts], _rest_of(result)))


def unpacked(data: bytes) -> GroupResult:
    """The arrays of all rollouts share their memory with each other."""
    arrays, others_G, rest = pickle.loads(data)
    parts_G = zip(*(_parted(*each) for each in arrays), strict=True)
    rollouts = [
        Rollout(*of_tokens, *of_sampled, *others)
        for (of_tokens, of_sampled), others in zip(parts_G, others_G, strict=True)
    ]
    return GroupResult(tuple(rollouts), *rest)


def _joined(result: GroupResult, names: tuple[str, ...]) -> tuple[list[int], list[np.ndarray]]:
    """The ends of the rollouts, and the arrays of each name."""
    lengths = [len(getattr(rollout, names[0])) for rollout in result.rollouts]
    return list(accumulate(lengths)), [np.concatenate([getattr(r, name) for r in result.rollouts]) for name in names]


def _parted(ends_G: list[int], arrays: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """For each rollout its part of each array."""
    for start, end in pairwise([0, *ends_G]):
        yield [array[start:end] for array in arrays]
