"""LearnerGroup: learner ranks in Ray actors, behind the methods of one `Learner`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from learner.learner import Learner
from tora.config.schema import RunConfig
from tora.errors import LearnerLost, ToraError
from tora.types import MicroBatch, PolicySnapshot, SnapshotRef, StepResult, TrainBatch

_PLACEMENT_TIMEOUT_S = 120
_DEATH_NOTICE_S = 10


class LearnerRank(Learner):
    """A `Learner` that is built once all ranks know where they are. Plain; `LearnerGroup` makes Ray actors of it."""

    def __init__(self) -> None:
        """Builds nothing; see `boot`."""

    def place(self) -> tuple[str, int, list[str]]:
        """This node's address, a port that is free on it, and the GPUs that Ray gave this rank."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return ray.util.get_node_ip_address(), port, gpus

    def boot(self, cfg: RunConfig, variables: dict[str, str]) -> None:
        """`variables`: torchrun's."""
        os.environ.update(variables)
        super().__init__(cfg)

    def versioned_snapshot(self) -> tuple[PolicySnapshot | None, int]:
        """As two values of Ray's, the second for who must not fetch the first. Collective; rank 0's alone is kept."""
        snapshot = self.snapshot()
        return snapshot if self.world.rank == 0 else None, snapshot.version


class LearnerGroup:
    """Blocks on its ranks. `snapshot` answers a reference, not bytes."""

    def __init__(self, cfg: RunConfig, num_gpus: float, place: Mapping[str, float]) -> None:
        """Starts `cfg.learner_ranks` Ray actors with `num_gpus` each and does not wait for their models; calls do.

        `place`: Ray resources that each also asks for, by which it lands on certain nodes.

        Errors: ToraError where the cluster has no room for them.
        """
        count = cfg.learner_ranks
        self._placement = placement_group([{"CPU": 1, "GPU": num_gpus, **place}] * count, strategy="PACK")
        try:
            ray.get(self._placement.ready(), timeout=_PLACEMENT_TIMEOUT_S)
        except GetTimeoutError as error:
            remove_placement_group(self._placement)
            raise ToraError(
                f"the cluster has no room for {count} learner ranks of 1 CPU and {num_gpus:g} GPUs; "
                f"free are {ray.available_resources()}"
            ) from error
        remote = ray.remote(LearnerRank)
        self._ranks = [
            remote.options(
                num_cpus=1,
                num_gpus=num_gpus,
                resources=dict(place),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index),
            ).remote()
            for index in range(count)
        ]
        places = self._get([rank.place.remote() for rank in self._ranks])
        self._booted = [
            rank.boot.remote(cfg, variables)
            for rank, variables in zip(self._ranks, torchrun_variables(places), strict=True)
        ]

    def _all(self, method: str, *args: Any) -> list[Any]:
        self._get(self._booted)
        return self._get([getattr(rank, method).remote(*args) for rank in self._ranks])

    def _get(self, answers: Sequence[Any]) -> list[Any]:
        """One answer of each rank. Errors: LearnerLost where one died, and then nothing is left of the others; what a
        rank raised as itself."""
        waiting = list(answers)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done)
            except RayActorError as error:
                self._lose(error)
            except RayTaskError as error:
                # a rank whose neighbour died may hear of it before we do, as a broken connection
                ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_DEATH_NOTICE_S) if waiting else ([], [])
                for other in ready:
                    if (death := _death(other)) is not None:
                        self._lose(death)
                if isinstance(error.cause, Exception):
                    raise error.cause from error
                raise
        return ray.get(list(answers))

    def _lose(self, error: RayActorError) -> NoReturn:
        for rank in self._ranks:
            ray.kill(rank)  # pyright: ignore[reportArgumentType]  Ray's types know handles by another class
        remove_placement_group(self._placement)
        raise LearnerLost("the learner is lost: one of its ranks died") from error

    def step(self, batch: TrainBatch) -> StepResult:
        return self._all("step", ray.put(batch))[0]

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        self._get(self._booted)
        return self._get([rank.logprobs.remote(batch, adapter=adapter) for rank in self._ranks])[0]

    def snapshot(self) -> SnapshotRef:
        """Holds an ObjectRef that this process owns, so it outlives the learner; the bytes go straight to workers."""
        self._get(self._booted)
        answers = [rank.versioned_snapshot.options(num_returns=2).remote() for rank in self._ranks]
        versions = self._get([version for _, version in answers])
        return SnapshotRef(versions[0], answers[0][0])

    def save(self, folder: Path) -> None:
        self._all("save", folder)

    def restore(self, folder: Path) -> None:
        self._all("restore", folder)

    def export(self, folder: Path) -> None:
        self._all("export", folder)


def _death(answer: Any) -> RayActorError | None:
    try:
        ray.get(answer)
    except RayActorError as error:
        return error
    except RayTaskError:
        return None
    return None


def torchrun_variables(places: Sequence[tuple[str, int, list[str]]]) -> list[dict[str, str]]:
    """What torchrun would set for ranks that lie at these addresses, ports and GPUs; rank 0's port is the group's.

    Every rank of a node sees all its ranks' GPUs, so that LOCAL_RANK picks one as it does under torchrun.
    """
    address, port, _ = places[0]
    result = []
    for rank, (node, _, gpus) in enumerate(places):
        on_node = [r for r, place in enumerate(places) if place[0] == node]
        variables = {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(on_node.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(on_node)),
        }
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(g for r in on_node for g in places[r][2])
        if address == "127.0.0.1":
            variables["GLOO_SOCKET_IFNAME"] = "lo"
        result.append(variables)
    return result
