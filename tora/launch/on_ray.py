"""An asynchronous run: learner ranks and rollout workers as Ray actors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from tora.config.schema import RunConfig
from tora.distributed.device import machine_memory
from tora.distributed.process_group import World
from tora.errors import ConfigError
from tora.launch.engines import largest_rank, make_torch_engine, make_vllm_engine, with_packing, worker_arguments
from tora.launch.memory import Devices, here, num_devices, snapshot_bytes
from tora.launch.ray_cluster import gpus_per_device, ray_session, role_resources
from tora.launch.room import Needs, Room
from tora.launch.signals import Stop
from tora.protocols import Learner, Rollouts
from tora.run.checkpoints import RunState
from tora.tasks.prompts import RunPrompts

if TYPE_CHECKING:
    from learner.ray_ranks import LearnerGroup


class OnRay:
    """Learner ranks and rollout workers, each a Ray actor. There is room for the first of them before any starts."""

    def __init__(self, cfg: RunConfig, stop: Stop | None = None) -> None:
        self._cfg, self.world, self._stop = cfg, World(), stop or Stop()
        self._learner: LearnerGroup | None = None
        # asked once: a node that is lost takes its resource with it, and what it ran waits for another such node
        self._of_learner = role_resources("learner", cfg.marked_nodes)
        self._of_rollout = role_resources("rollout", cfg.marked_nodes)
        self._gpus = gpus_per_device(num_devices(cfg), cfg.device, whole=cfg.whole_gpus)
        self._cfg = with_packing(cfg, on_gpu=self._gpus > 0)
        self.devices = _devices(cfg, self._gpus)
        if cfg.rollout.tensor_parallel > 1 and 0 < self._gpus < 1:
            raise ConfigError(f"rollout.tensor_parallel={cfg.rollout.tensor_parallel} needs whole GPUs{_wanted(cfg)}")
        if cfg.learner_ranks > 1 and 0 < self._gpus < 1:
            raise ConfigError(
                f"learner_ranks={cfg.learner_ranks} needs whole GPUs{_wanted(cfg)} NCCL refuses two ranks on one "
                "GPU; use learner_ranks=1 or fewer workers."
            )
        self._worker_gpus = self._gpus * cfg.rollout.tensor_parallel
        self._room = Room(
            Needs(
                ranks=cfg.learner_ranks,
                rank={"CPU": 1.0, "GPU": self._gpus, **self._of_learner},
                workers=cfg.rollout.min_workers or cfg.rollout.num_workers,
                worker={"CPU": float(cfg.rollout.tensor_parallel), "GPU": self._worker_gpus, **self._of_rollout},
            )
        )

    def learner(self) -> Learner:
        from learner.ray_ranks import LearnerGroup

        if self._learner is not None:
            self._learner.kill()  # it may have been given up by another sign than the death of a rank
        self._room.wait()
        group = self._learner = LearnerGroup(self._cfg, self._gpus, self._of_learner, self._room.of_ranks())
        if 0 < self._gpus < 1:
            # vLLM counts memory that others take while it starts as its own
            group.wait_until_loaded()
        return group

    def rollouts(self, prompts: RunPrompts, state: RunState) -> Rollouts:
        from actors.pool import AsyncRollouts
        from actors.ray_worker import ray_workers
        from tora.launch.prompt_source import prompt_source

        vllm = self._cfg.rollout.engine == "vllm"
        # a whole GPU or none, without which the share has no effect, is 1
        make_vllm = partial(make_vllm_engine, gpu_share=self._gpus or 1.0, max_rank=largest_rank(self._cfg))
        make = make_vllm if vllm else make_torch_engine
        arguments = {"make_engine": partial(make, self._cfg), **worker_arguments(self._cfg, prompts)}
        options = {
            "num_cpus": self._cfg.rollout.tensor_parallel,
            "num_gpus": self._worker_gpus,
            "resources": self._of_rollout,
            # one thread per group in flight, as many for calls of an evaluation, of which there is always room for one,
            # and one each for log-probs, snapshots, heartbeats and aborts
            "max_concurrency": 2 * self._cfg.rollout.concurrency + 5,
        }
        make_worker = ray_workers(arguments, self._cfg, **options)
        return AsyncRollouts(
            self._cfg,
            partial(make_worker, self._room.of_worker),
            prompt_source(self._cfg, prompts),
            prompts.held_out,
            state.rollouts,
            version=state.step,
            stop_requested=self._stop,
            watch=self._check_learner,
            make_evaluator=partial(make_worker, gives_way=True),
        )

    def _check_learner(self) -> None:
        """Raises LearnerLost. A learner that is lost while nothing needs it is replaced at once: workers that were lost
        with it may wait for long."""
        if self._learner is not None:
            self._learner.check()


def _wanted(cfg: RunConfig) -> str:
    """The end of a sentence that says what needs whole GPUs."""
    settings = [f"rollout.num_workers={cfg.rollout.num_workers}", f"learner_ranks={cfg.learner_ranks}"]
    if cfg.eval is not None and cfg.eval.num_workers:
        settings.append(f"eval.num_workers={cfg.eval.num_workers}")
    return f": with {', '.join(settings)} the run needs {num_devices(cfg)}, but the cluster has fewer."


def _devices(cfg: RunConfig, share: float) -> Devices:
    """As far as this machine tells: on a cluster of several, GPUs are taken to be like its own."""
    if share == 0:
        return here(cfg) if "RAY_ADDRESS" not in os.environ else Devices(False, None)
    capacity = machine_memory(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    return Devices(True, capacity, math.ceil(num_devices(cfg) * share))


@contextmanager
def on_ray(cfg: RunConfig, stop: Stop) -> Iterator[OnRay]:
    """Joins or starts a Ray cluster, and leaves or stops it at the end."""
    scratch = stop.leftovers.scratch if stop.leftovers is not None else None
    with ray_session(num_devices(cfg), snapshot_bytes=snapshot_bytes(cfg), scratch=scratch):
        yield OnRay(cfg, stop)
