"""LearnerGroup: learner ranks in Ray actors, behind the interface of one `Learner`."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from learner.learner import Learner
from learner.rank_errors import told
from learner.watchdog import Watchdog, size, stacks_file
from tora.batching.stored_images import StoredBatch, with_images, without_images
from tora.config.components import import_from
from tora.config.schema import RunConfig
from tora.distributed.process_group import STORE_KEY
from tora.distributed.ray_logs import keep_log
from tora.distributed.versions import differences, installed
from tora.errors import ImageLost, LearnerLost, TrainingError
from tora.types import MicroBatch, PolicySnapshot, SnapshotRef, StepResult, TrainBatch

_WARN_UNPLACED_AFTER_S = 60
_DEATH_NOTICE_S = 10
_BEAT, _BEAT_EVERY_S = "beat", 2.0
_FILES = "files"
_log = logging.getLogger(__name__)


class LearnerRank(Learner):
    """A `Learner` built in two steps, since ranks must know each other's addresses first. A plain class; `LearnerGroup`
    makes it a Ray actor."""

    def __init__(self) -> None:
        """Builds nothing; see `boot`."""

    def pid(self) -> int:
        return os.getpid()

    def versions(self) -> dict[str, str]:
        return installed()

    def beat(self) -> None:
        """Answered by a thread of its own, whatever the rank does, unless its process is stopped as a whole."""

    def location(self) -> tuple[str, int, list[str]]:
        """This node's address, a free port on it, and the GPUs that Ray assigned to this rank."""
        with socket.socket() as probe:
            probe.bind((ray.util.get_node_ip_address(), 0))
            port = probe.getsockname()[1]
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return ray.util.get_node_ip_address(), port, gpus

    def boot(self, cfg: RunConfig, variables: dict[str, str]) -> None:
        """`variables`: the environment that torchrun would set, see `torchrun_variables`."""
        os.environ.update(variables)
        import_from(cfg.import_from or ())
        self._watchdog = Watchdog(cfg.learner_timeout_s, stacks_file(cfg.output_dir, int(variables["RANK"])))
        with told(), Watchdog(cfg.learner_timeout_s, None).watching():  # the folder may still be another run's
            super().__init__(cfg, on_micro_batch=self._watchdog.mark)

    def step(self, batch: TrainBatch) -> StepResult:
        with told(), self._watchdog.watching():
            return super().step(batch)

    def step_with(self, stored: StoredBatch) -> StepResult:
        return self.step(read_batch(stored))

    def accumulate_with(self, stored: StoredBatch) -> None:
        with told(), self._watchdog.watching():
            super().accumulate(read_batch(stored))

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        with told(), self._watchdog.watching():
            return super().logprobs(batch, adapter=adapter)

    def snapshot(self) -> PolicySnapshot:
        with told(), self._watchdog.watching():
            return super().snapshot()

    def try_out(self, on: bool) -> None:
        with told(), self._watchdog.watching():
            super().try_out(on)

    def begin_save(self, folder: Path) -> None:
        with told(), self._watchdog.watching():
            super().begin_save(folder)

    def end_save(self) -> None:
        """Answered by a thread of its own, so that steps go on meanwhile."""
        with told():
            super().end_save()

    def restore(self, folder: Path) -> None:
        with told(), self._watchdog.watching():
            super().restore(folder)

    def export(self, folder: Path) -> None:
        with told(), self._watchdog.watching():
            super().export(folder)

    def versioned_snapshot(self) -> tuple[PolicySnapshot | None, int]:
        """The snapshot and its version as two Ray objects, so that the driver can read the version without fetching the
        tensors. Collective; only rank 0 returns the snapshot."""
        snapshot = self.snapshot()
        return snapshot if self.world.rank == 0 else None, snapshot.version


class LearnerGroup:
    """Implements `tora.protocols.Learner` over N ranks; every method blocks until all have finished."""

    def __init__(
        self, cfg: RunConfig, num_gpus: float, resources: Mapping[str, float], places: Sequence[Any] = ("DEFAULT",)
    ) -> None:
        """Start `cfg.learner_ranks` Ray actors with `num_gpus` each. Their models load in the background; the first
        call waits for them.

        `resources`: custom Ray resources that each actor also requests, which select the nodes it may run on. `places`:
        Ray's scheduling strategy of each.
        """
        count, self._output_dir, self._limit_s = cfg.learner_ranks, cfg.output_dir, cfg.learner_timeout_s
        stacks = [stacks_file(cfg.output_dir, rank) for rank in range(count)]
        self._stacks = {file: size(file) for file in stacks}  # by an earlier learner, or by the run before
        threads = {_BEAT: 1, _FILES: 1}
        remote = ray.remote(concurrency_groups=threads)(LearnerRank)  # pyright: ignore[reportCallIssue]  Ray has it
        needs = {"num_cpus": 1, "num_gpus": num_gpus, "resources": dict(resources)}
        self._ranks = [remote.options(**needs, scheduling_strategy=place).remote() for place in places]
        assert len(self._ranks) == count, "a place for each rank"
        self._pids: list[int] = []  # of the ranks, once they are placed
        self._beats: dict[int, tuple[Any, float]] = {}
        """By rank: a heartbeat that is not answered yet, and when it was sent."""
        pids = [rank.pid.remote() for rank in self._ranks]
        while len(ray.wait(pids, num_returns=count, timeout=_WARN_UNPLACED_AFTER_S)[0]) < count:
            told = "the learner is waiting for room in the cluster, as after the loss of its node: %d x %s; free: %s"
            _log.warning(told, count, needs, ray.available_resources())
        self._pids = self._get(pids)
        locations = self._get([rank.location.remote() for rank in self._ranks])
        there = self._get([rank.versions.remote() for rank in self._ranks])
        for clause in sorted({differences(installed(), versions) for versions in there} - {""}):
            _log.warning("the node of a learner rank %s", clause)
        self._booted = [
            rank.boot.remote(cfg, variables)
            for rank, variables in zip(self._ranks, torchrun_variables(locations), strict=True)
        ]

    def wait_until_loaded(self) -> None:
        """Block until every rank holds its model. Raises as the other methods do."""
        self._get(self._booted)

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        self._get(self._booted)
        return self._get([getattr(rank, method).remote(*args) for rank in self._ranks])

    def _get(self, answers: Sequence[Any]) -> list[Any]:
        """The ranks' answers. Raises LearnerLost if a rank died, after killing the others; re-raises what a rank
        raised."""
        waiting = list(answers)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=_BEAT_EVERY_S)
            if not done:
                self.check()
                continue
            try:
                ray.get(done)
            except RayActorError as error:
                self._fail(error)
            except RayTaskError as error:
                # a rank may notice the death of another before we do, as a broken connection
                ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_DEATH_NOTICE_S) if waiting else ([], [])
                for other in ready:
                    if (death := _death(other)) is not None:
                        self._fail(death)
                if isinstance(error.cause, LearnerLost):
                    self.kill()
                if isinstance(error.cause, TrainingError):
                    raise TrainingError("; ".join([str(error.cause), *self._kept_logs()])) from error
                if isinstance(error.cause, Exception):
                    raise error.cause from error
                raise
        return ray.get(list(answers))

    def check(self) -> None:
        """Raises LearnerLost if a rank has died, or has answered no heartbeat for `learner_timeout_s`. For the times in
        which no call waits for the ranks."""
        for rank, _ in enumerate(self._pids):  # none of a process that has yet to start
            beat, since = self._beats.get(rank, (None, 0.0))
            if beat is None or ray.wait([beat], timeout=0)[0]:
                if beat is not None and (death := _death(beat)) is not None:
                    self._fail(death)
                fresh = self._ranks[rank].beat.options(concurrency_group=_BEAT).remote()
                self._beats[rank] = fresh, time.monotonic()
            # one more look: it may be this process that was stopped, with the answer waiting for it
            elif time.monotonic() > since + self._limit_s and not ray.wait([beat], timeout=_BEAT_EVERY_S)[0]:
                self.kill()
                how = f"rank {rank} has answered nothing for learner_timeout_s={self._limit_s:g}, as if it were stopped"
                raise LearnerLost(f"the learner is lost: {how}")

    def kill(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            ray.kill(rank)  # pyright: ignore[reportArgumentType]  Ray types handles as another class

    def _fail(self, error: RayActorError) -> NoReturn:
        hung = self._hung()
        self.kill()
        if hung:
            how = f"it made no progress for learner_timeout_s; where it was is in {', '.join(map(str, hung))}"
            raise LearnerLost(f"the learner is lost: {how}") from error
        how = "; ".join(["one of its ranks died", *self._kept_logs()])
        raise LearnerLost(f"the learner is lost: {how}") from error

    def _kept_logs(self) -> list[str]:
        """A clause for each rank that has printed something."""
        kept = [keep_log(pid, self._output_dir, f"learner_rank_{rank}_log") for rank, pid in enumerate(self._pids)]
        return [clause for clause in kept if clause]

    def _hung(self) -> list[Path]:
        """The stacks that ranks have written. A rank that waits for one that hangs may be out of time just before it,
        so the others are given some seconds to write theirs."""
        deadline = time.monotonic() + _DEATH_NOTICE_S
        while True:
            hung = [file for file, before in self._stacks.items() if size(file) not in (0, before)]
            if len(hung) in (0, len(self._stacks)) or time.monotonic() > deadline:
                return hung
            time.sleep(0.1)

    def step(self, batch: TrainBatch) -> StepResult:
        return self._call_all("step_with", ray.put(without_images(batch)))[0]

    def accumulate(self, batch: TrainBatch) -> None:
        self._call_all("accumulate_with", ray.put(without_images(batch)))

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        self._get(self._booted)
        return self._get([rank.logprobs.remote(batch, adapter=adapter) for rank in self._ranks])[0]

    def try_out(self, on: bool) -> None:
        self._call_all("try_out", on)

    def snapshot(self) -> SnapshotRef:
        """A reference to an object that this process owns, so it outlives the learner. Workers fetch the bytes."""
        self._get(self._booted)
        answers = [rank.versioned_snapshot.options(num_returns=2).remote() for rank in self._ranks]
        versions = self._get([version for _, version in answers])
        return SnapshotRef(versions[0], answers[0][0])

    def begin_save(self, folder: Path) -> None:
        self._call_all("begin_save", folder)

    def end_save(self) -> None:
        """Waits for rank 0, which writes; its death shows in the other calls too, which then end the learner. Raises
        LearnerLost if it writes for longer than `learner_timeout_s`, as to a file server that is gone."""
        written = self._ranks[0].end_save.options(concurrency_group=_FILES).remote()
        # called by a thread beside the other calls, whose heartbeats are to tell first of a rank that is stopped
        if not ray.wait([written], timeout=self._limit_s + 5 * _BEAT_EVERY_S)[0]:
            self.kill()
            raise LearnerLost(f"the learner is lost: it wrote a checkpoint for learner_timeout_s={self._limit_s:g}")
        try:
            ray.get(written)
        except RayActorError as error:
            raise LearnerLost("the learner is lost while it writes a checkpoint") from error
        except RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise

    def restore(self, folder: Path) -> None:
        self._call_all("restore", folder)

    def export(self, folder: Path) -> None:
        self._call_all("export", folder)


def read_batch(stored: StoredBatch) -> TrainBatch:
    """The batch with its images. Raises LearnerLost if one cannot be read: a learner that starts again gets a batch
    whose images are made again."""
    try:
        return with_images(stored)
    except ImageLost as error:
        raise LearnerLost(f"the learner is lost: {error}") from error


def _death(answer: Any) -> RayActorError | None:
    try:
        ray.get(answer)
    except RayActorError as error:
        return error
    except RayTaskError:
        return None
    return None


def torchrun_variables(locations: Sequence[tuple[str, int, list[str]]]) -> list[dict[str, str]]:
    """The variables that torchrun would set for ranks with these addresses, free ports and GPUs. Rank 0's address and
    port are the rendezvous.

    Every rank sees the GPUs of all ranks on its node, so that LOCAL_RANK selects one as it does under torchrun.
    """
    address, port, _ = locations[0]
    key, result = secrets.token_hex(32), []
    for rank, (node, _, gpus) in enumerate(locations):
        on_node = [r for r, location in enumerate(locations) if location[0] == node]
        variables = {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            STORE_KEY: key,
            "RANK": str(rank),
            "WORLD_SIZE": str(len(locations)),
            "LOCAL_RANK": str(on_node.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(on_node)),
        }
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(g for r in on_node for g in locations[r][2])
        if address == "127.0.0.1":
            variables["GLOO_SOCKET_IFNAME"] = "lo"
        result.append(variables)
    return result
