"""A synchronous run: learner, engine and rollouts in one process, or in each of several ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tora.config.schema import RunConfig
from tora.distributed.process_group import World, leave
from tora.errors import ConfigError
from tora.launch.engines import (
    largest_rank,
    make_vllm_engine,
    shared_torch_engine,
    shares_base,
    with_packing,
    worker_arguments,
)
from tora.launch.memory import here, sync_share
from tora.launch.signals import Stop
from tora.protocols import Engine, Learner, Rollouts
from tora.run.checkpoints import RunState
from tora.tasks.prompts import RunPrompts

if TYPE_CHECKING:
    from actors.vllm_engine.engine import VLLMEngine

_log = logging.getLogger(__name__)


def check_in_process(cfg: RunConfig) -> None:
    """Raises ConfigError if vLLM would change the class that the learner runs.

    It compiles the classes that it takes from transformers in place, for the whole process.
    """
    if cfg.rollout.engine != "vllm":
        return
    from actors.vllm_engine.arguments import class_of_transformers

    if name := class_of_transformers(cfg.model.path):
        raise ConfigError(
            f"vLLM serves {name} with transformers' own classes, which it changes for the whole process: in a "
            "synchronous run this model needs rollout.engine=torch."
        )


class InProcess:
    """Learner and rollouts of this process. Call `learner` before `rollouts`: the torch engine shares its model."""

    def __init__(self, cfg: RunConfig, stop: Stop) -> None:
        self._stop = stop
        self.world = World.from_environment()
        check_in_process(cfg)
        self.devices = here(cfg)
        self._cfg = with_packing(cfg, on_gpu=self.devices.on_gpu)
        self._vllm: VLLMEngine | None = None
        """Started before the learner where that takes its frozen weights from it."""

    def learner(self) -> Learner:
        from learner.learner import Learner as Rank
        from learner.shared_base import SharedBase

        shared = None
        if shares_base(self._cfg, on_gpu=self.devices.on_gpu):
            self._vllm = self._vllm or self._start_vllm()
            shared = SharedBase(self._vllm.base_weights)
        self._learner = Rank(self._cfg, shares_model=self._cfg.rollout.engine == "torch", shared_base=shared)
        if shared is not None and shared.nbytes == 0:
            _log.warning("vLLM holds no weights as they were loaded, so the learner has a copy of its own")
        return self._learner

    def rollouts(self, prompts: RunPrompts, state: RunState) -> Rollouts:
        from actors.local import LocalRollouts
        from actors.worker import RolloutWorker

        worker = RolloutWorker(self._engine, **worker_arguments(self._cfg, prompts))
        return LocalRollouts(self._cfg, worker, prompts.at, prompts.held_out, state.rollouts, self.world, self._stop)

    def close(self) -> None:
        """End an engine that `rollouts` has not taken over."""
        if self._vllm is not None:
            self._vllm.close()

    def _engine(self) -> Engine:
        if self._cfg.rollout.engine == "torch":
            return shared_torch_engine(self._cfg, self._learner)
        return self._vllm or self._start_vllm()

    def _start_vllm(self) -> VLLMEngine:
        on_gpu = self.devices.on_gpu
        return make_vllm_engine(self._cfg, sync_share(self._cfg, on_gpu=on_gpu), largest_rank(self._cfg), on_gpu=on_gpu)


@contextmanager
def in_process(cfg: RunConfig, stop: Stop) -> Iterator[InProcess]:
    """Leaves the process group at the end."""
    site = None
    try:
        site = InProcess(cfg, stop)
        yield site
    finally:
        if site is not None:
            site.close()
        leave()
