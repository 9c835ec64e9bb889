"""A group's prompt and its result on their way between driver and worker."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from actors.packed_group import packed, packed_call, unpacked, unpacked_call
from tora.models.vision.encoded_image import EncodedImage
from tora.types import BadLogprob, FailedReward, GroupResult, Prompt, Rollout, StopReason


def episode(seed: int) -> Rollout:
    """Every field has a value that no other has."""
    rng = np.random.default_rng(seed)
    sampled = rng.random(length := int(rng.integers(2, 9))) < 0.6
    sampled[rng.integers(length)] = True
    return Rollout(
        token_ids=rng.integers(3, 2**40, length),
        sampled=sampled,
        actor_logprobs=-rng.random(sampled.sum()).astype(np.float32),
        versions=rng.integers(0, 9, sampled.sum()),
        stop_reason=list(StopReason)[seed % 3],
        text=f"text {seed}",
        reward=seed + 0.5,
        reward_parts={"first": float(seed), "second": float("nan")},
        kept_mass=0.25 + seed,
        extras={"note": [seed]},
        turns=seed + 2,
        tool_calls=seed + 3,
        tool_errors=seed + 4,
        turn_rewards=(0.125 * seed,),
        images=(EncodedImage(bytes([seed] * 40)),),
        messages=({"role": "user", "content": str(seed)},),
    )


def results() -> dict[str, GroupResult]:
    failed, bad = FailedReward("length", "returned nan", {"length": 0.0}, " (here)"), BadLogprob(3, float("-inf"), 7)
    return {
        "whole": GroupResult(
            tuple(map(episode, range(5))), (failed,), 1.5, (bad,), {"logged": [1.0, 2.0]}, ("a line",)
        ),
        "one": GroupResult((episode(1),)),
        "none": GroupResult((), (failed, failed), 0.25, (bad,)),
        "aborted": GroupResult(()),
    }


def check_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    for field in fields(wanted):
        value, other = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "rollouts":
            assert len(value) == len(other)
            for pair in zip(value, other, strict=True):
                check_same(*pair)
        elif isinstance(other, np.ndarray):
            assert value.dtype == other.dtype
            np.testing.assert_array_equal(value, other)
        else:
            assert repr(value) == repr(other), field.name  # NaN is not equal to itself


@pytest.mark.parametrize("name", results())
def test_a_result_comes_back_as_it_was(name: str) -> None:
    check_same(unpacked(packed(results()[name])), results()[name])


def test_images_keep_their_kind() -> None:
    (rollout,) = unpacked(packed(results()["one"])).rollouts
    assert [type(image) for image in rollout.images] == [EncodedImage]


def test_a_call_comes_back_as_it_was() -> None:
    prompt = Prompt(7, (3, 4), [{"role": "user"}], {"answer": "4"}, (EncodedImage(b"png"), EncodedImage(b"jpeg")))
    pickled, *images = packed_call(prompt, 9)
    assert b"jpeg" not in pickled, "images go beside it"
    assert unpacked_call(pickled, *images) == (prompt, 9)


def test_arrays_may_be_written_to() -> None:
    """As those of an engine in the same process."""
    first, second = unpacked(packed(GroupResult((episode(1), episode(2))))).rollouts
    first.actor_logprobs[:] = 1.0
    np.testing.assert_array_equal(second.actor_logprobs, episode(2).actor_logprobs)
