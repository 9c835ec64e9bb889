"""A canary over real engines with fixed probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fakes import make_prompt
from tiny import LINEARS

from actors.worker import RolloutWorker
from learner.learner import Learner
from tora.adapters.inject import refresh
from tora.config.schema import ModelConfig, RolloutConfig, RunConfig
from tora.rewards.rewarder import FunctionRewarder
from tora.run.canary import Canary
from tora.types import LogprobRequest, Sampling, SyncReport

PROBES = [replace(make_prompt(i), token_ids=tuple((7 * k + i) % 250 + 3 for k in range(40 + i))) for i in range(3)]


class Run:
    """A learner whose adapter has an effect, and the worker that serves it."""

    def __init__(self, folder: Path, lora_type: str, dtype: str = "fp32") -> None:
        model = ModelConfig(path=str(folder), lora_type=lora_type, lora_rank=4, lora_targets=list(LINEARS))  # pyright: ignore[reportArgumentType]
        self.cfg = RunConfig(name="run", dtype=dtype, model=model, dataset={}, rewards=[], rollout=RolloutConfig())  # pyright: ignore[reportArgumentType]
        self.learner = Learner(self.cfg)
        self.change(0.1)

    @torch.no_grad()
    def change(self, size: float) -> None:
        """Stand-in for an optimizer step: random noise of this size on every trained parameter."""
        generator = torch.Generator().manual_seed(self.learner.version)
        for parameter in self.learner._parameters.values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
        self.learner.version += 1
        refresh(self.learner.model)

    def serve(self, make_engine: Callable[[], Any]) -> RolloutWorker:
        sampling = Sampling(8)
        self.engine = make_engine()
        self.worker = RolloutWorker(
            lambda: self.engine,
            lambda: FunctionRewarder(()),
            None,
            sampling=sampling,
            eval_sampling=sampling,
            group_size=2,
            seed=0,
        )
        return self.worker

    def sync(self) -> SyncReport:
        report = self.worker.forward(self.learner.snapshot())
        canary = Canary.from_config(replace(self.cfg, sync=replace(self.cfg.sync, canary_every=1)), PROBES)
        self.metrics = canary.check(self.learner.version, self.learner, Workers(self.worker))
        return report


class Workers:
    """`Rollouts.logprobs` for a single worker."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        return {0: self.worker.logprobs(requests, adapter=adapter)}
