"""What a group costs the driver, with 256 workers and prompts of 1 MB: `python -m tora.bench.driver`.

The real loop, pool and buffer, and Ray's calls and objects. Two Ray actors answer at once for all 256 workers, and the
learner only puts its batch into the object store, where ranks would read it: what is measured is the driver's own
work, as the processor time of its whole process, Ray's threads included, and of its event loop's thread. Prompts come
from a process of their own, from which the actors fetch images; with `--in-driver` from threads of the driver. Image
files are made before, as a dataset has them, and are not decoded, as a model's processor would do to know their sizes.
Sizes are those of the pickled messages.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from actors.packed_group import packed, packed_call, unpacked, unpacked_call
from actors.prompt_process import PromptProcess
from actors.prompts_ahead import PromptMaker, Read
from tora.batching.stored_images import stored, without_images
from tora.bench.simulate import WARM_UP, Scenario, SleepingLearner, result_of, scenario_config, timed_run
from tora.launch.ray_cluster import ray_session
from tora.models.vision.parts import encoded
from tora.protocols import Occupancy
from tora.types import GroupResult, LogprobRequest, PolicySnapshot, Prompt, StepResult, SyncReport, TrainBatch

_NUM_ACTORS = 2
_TOKENS = 64


class Answering:
    """In a Ray actor: answers a group at once."""

    def __init__(self) -> None:
        self.version = 0

    def run_group_packed(self, *call: bytes) -> bytes:
        _, version = unpacked_call(*call)
        return packed(result_of(version))


class SharedWorker:
    """A worker's handle, as `actors.ray_worker.RayWorker`, to an actor that others share."""

    def __init__(self, actor: Any) -> None:
        self._actor, self._version = actor, 0

    async def start(self, limit_s: float) -> None: ...

    async def run_group(self, prompt: Prompt) -> GroupResult:
        return unpacked(await self._actor.run_group_packed.remote(*packed_call(prompt, self._version)))

    async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
        return [await self.run_group(prompt) for prompt in prompts]

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]:
        return []

    async def forward(self, snapshot: PolicySnapshot) -> SyncReport:
        self._version = snapshot.version
        return SyncReport(snapshot.version, 0, 0.0, "", 0)

    async def occupancy(self) -> Occupancy:
        return Occupancy()

    def keep_log(self) -> str:
        return ""

    async def close(self) -> None: ...

    def kill(self) -> None: ...


class PuttingLearner(SleepingLearner):
    """Notes the processor time of the process and of the event loop after each step."""

    def __init__(self) -> None:
        super().__init__(0.0, batch_size=1)
        self.process: list[float] = []
        self.loop: list[float] = []

    def accumulate(self, batch: TrainBatch) -> None:
        import ray

        ray.put(without_images(batch))
        super().accumulate(batch)

    def step(self, batch: TrainBatch) -> StepResult:
        result = super().step(batch)
        self.process.append(time.process_time())
        self.loop.append(_seconds_of("rollouts"))
        return result


def _seconds_of(thread: str) -> float:
    """Processor time of a thread of this process."""
    ident = next(each.ident for each in threading.enumerate() if each.name == thread)
    assert ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


@dataclass(frozen=True, slots=True)
class Work:
    process_ms: float
    """Processor time of the driver, for each group."""
    loop_ms: float
    """Of its event loop's thread."""
    sent: int
    """Bytes of a prompt."""
    received: int
    """Bytes of its group."""


class Dataset:
    """Prompts with an image each."""

    def __init__(self, num_images: int, image_bytes: int) -> None:
        rng = np.random.default_rng(0)
        self._files = [rng.bytes(image_bytes) for _ in range(num_images)]

    def prompt(self, number: int) -> Prompt:
        return Prompt(number, tuple(range(_TOKENS)), "", {}, (encoded(self._files[number % len(self._files)]),))

    def read(self, number: int) -> Callable[[], Prompt]:
        return partial(self.prompt, number)


def _reading(num_images: int, image_bytes: int) -> Read:
    return Dataset(num_images, image_bytes).read


def measure(num_workers: int, image_bytes: int, num_steps: int, *, in_driver: bool = False) -> Work:
    import ray

    dataset = Dataset(num_workers, image_bytes)
    scenario = Scenario(num_workers, 0.0, 0.0, 0.0, num_steps)
    with ray_session(_NUM_ACTORS, snapshot_bytes=0):
        actors = cycle([ray.remote(Answering).options(num_cpus=1).remote() for _ in range(_NUM_ACTORS)])
        learner = PuttingLearner()
        prompts = (
            PromptMaker(lambda number: partial(stored, dataset.read(number)))
            if in_driver
            else PromptProcess(partial(_reading, num_workers, image_bytes))
        )
        cfg = scenario_config(scenario, 1)
        timed_run(cfg, lambda: SharedWorker(next(actors)), dataset.prompt, 0.0, learner, prompts=prompts)
    groups = num_workers * num_steps
    first, last = WARM_UP - 1, WARM_UP + num_steps - 1
    return Work(
        process_ms=1000 * (learner.process[last] - learner.process[first]) / groups,
        loop_ms=1000 * (learner.loop[last] - learner.loop[first]) / groups,
        sent=len(pickle.dumps(dataset.prompt(0))),
        received=len(packed(result_of(0))),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tora.bench.driver", description=__doc__)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--image-bytes", type=int, default=10**6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--in-driver", action="store_true", help="make prompts in the driver")
    args = parser.parse_args(arguments)
    if min(args.workers, args.steps, args.image_bytes) < 1:
        parser.error("--workers, --image-bytes and --steps are at least 1")
    work = measure(args.workers, args.image_bytes, args.steps, in_driver=args.in_driver)
    print(
        f"{args.workers} workers, prompts of {work.sent:,} bytes: {work.process_ms:.2f} ms of the driver a group, "
        f"{work.loop_ms:.2f} ms of them on its event loop; a group comes back as {work.received:,} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
