"""A synchronous run: learner, engine and rollouts in one process, or in each rank under torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tora.config.schema import RunConfig
from tora.distributed.process_group import World, leave
from tora.errors import ConfigError
from tora.launch.engines import largest_rank, make_vllm_engine, shared_torch_engine, with_packing, worker_arguments
from tora.launch.memory import SYNC_SHARE, here
from tora.launch.signals import Stop
from tora.protocols import Learner, Rollouts
from tora.run.checkpoints import RunState
from tora.tasks.prompts import RunPrompts


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

    def learner(self) -> Learner:
        from learner.learner import Learner as Rank

        self._learner = Rank(self._cfg, shares_model=self._cfg.rollout.engine == "torch")
        return self._learner

    def rollouts(self, prompts: RunPrompts, state: RunState) -> Rollouts:
        from actors.local import LocalRollouts
        from actors.worker import RolloutWorker

        vllm = self._cfg.rollout.engine == "vllm"
        make_engine = (
            partial(make_vllm_engine, self._cfg, SYNC_SHARE, largest_rank(self._cfg), on_gpu=self.devices.on_gpu)
            if vllm
            else partial(shared_torch_engine, self._cfg, self._learner)
        )
        worker = RolloutWorker(make_engine, **worker_arguments(self._cfg, prompts))
        return LocalRollouts(self._cfg, worker, prompts.at, prompts.held_out, state.rollouts, self.world, self._stop)


@contextmanager
def in_process(cfg: RunConfig, stop: Stop) -> Iterator[InProcess]:
    """Leaves the process group at the end."""
    try:
        yield InProcess(cfg, stop)
    finally:
        leave()
