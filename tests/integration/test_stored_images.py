"""A large image is in Ray's object store once, for its worker and for the learner."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pools import config
from stores import stored_mib, wait_until
from tiny import make_vl_model
from vision_learners import batch_of, vision_groups, vl_config

from learner.learner import Learner
from tora.batching.stored_images import LEAST_BYTES, store
from tora.launch.ray_cluster import ray_session
from tora.models.vision.encoded_image import EncodedImage
from tora.types import Group, Prompt, Sampling

MIB = 1 << 20
SIZE = 4 * MIB


def make_engine(file: Path) -> Callable[[], Any]:
    """Of an engine that writes down the digests of a request's images, and generates nothing."""

    def make() -> Any:
        from actors.abort import Aborted

        class Seeing:
            def generate(self, requests: Sequence[Any]) -> Any:
                with file.open("a") as seen:
                    seen.writelines(hashlib.sha256(image).hexdigest() + "\n" for image in requests[0].images)
                raise Aborted

            def close(self) -> None: ...

        return Seeing()

    return make


def enlarged(groups: list[Group]) -> list[Group]:
    """With images of 4 MiB that show the same: what follows the end of a PNG is not read. Equal ones are one object, as
    in a batch of a run."""
    known, rest = dict[bytes, EncodedImage](), np.random.default_rng(0).bytes(SIZE)

    def large(prompt: Prompt) -> Prompt:
        images = (known.setdefault(i, EncodedImage((i + rest)[:SIZE])) for i in prompt.images)
        return replace(prompt, images=tuple(images))

    return [replace(group, prompt=large(group.prompt)) for group in groups]


def test_worker_and_learner_read_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    image, small = EncodedImage(bytes(LEAST_BYTES)), EncodedImage(b"small")
    assert store([small, b""]) == [small, b""], "without a cluster"
    with ray_session(2):
        first, second, third = store([image, small, bytes(LEAST_BYTES)])
        assert ray.get(first) == image and second is small and third == bytes(LEAST_BYTES)
        assert store([image]) == [first]
        check_one_copy(tmp_path)
    with ray_session(1):  # a script may run twice, each time on a cluster of its own
        assert ray.get(store([image])) == [image]


def check_one_copy(tmp_path: Path) -> None:
    from actors.ray_worker import ray_workers
    from learner.ray_ranks import LearnerGroup

    model = make_vl_model(tmp_path / "model")
    cfg = vl_config(model, "lora", "lora", output_dir=str(tmp_path / "run"))
    small = vision_groups(model)
    groups = enlarged(small)
    num_stored = SIZE // MIB * len({image for group in groups for image in group.prompt.images})
    assert num_stored < SIZE // MIB * sum(len(group.prompt.images) for group in groups)
    sampling = Sampling(1)
    arguments = {"tokenizer": None, "sampling": sampling, "eval_sampling": sampling, "group_size": 2, "seed": 0}
    seen, before = tmp_path / "seen", stored_mib()

    class Rewarder:
        def close(self) -> None: ...

    engine = {"make_engine": make_engine(seen), "make_rewarder": Rewarder}
    make = ray_workers({**arguments, **engine}, config(1), num_cpus=1)

    async def run_groups() -> None:
        worker = make()
        await worker.start(60)
        for group in groups:
            await worker.run_group(group.prompt)
            await worker.run_group(group.prompt)  # as after the loss of a worker
        await worker.close()

    asyncio.run(run_groups())
    expected = [hashlib.sha256(image).hexdigest() for group in groups for image in 2 * group.prompt.images]
    assert seen.read_text().split() == expected
    wait_until(lambda: stored_mib() - before == num_stored)

    learner = LearnerGroup(cfg, 0.0, {})
    result = learner.step(batch_of(groups, capacity=60))
    assert len(batch_of(groups, capacity=60).micro_batches) > 1
    timed = {name for name in result.metrics if name.startswith("time/")}
    alone = Learner(cfg).step(batch_of(small, capacity=60))
    assert {k: v for k, v in result.metrics.items() if k not in timed} == {
        k: v for k, v in alone.metrics.items() if k not in timed
    }
    wait_until(lambda: stored_mib() - before == num_stored)
    learner.kill()
    groups.clear()
    wait_until(lambda: stored_mib() <= before)
