"""How many workers an asynchronous run has for evaluations alone, where its config leaves that open."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from tora.config.rules import lacks_for_eval_workers
from tora.config.schema import RunConfig
from tora.distributed.device import machine_memory
from tora.launch.memory import Devices, num_devices, plan_or_none

_SHARE = 0.5
"""Of the machine's memory, that the whole run may take with a worker for evaluations."""
_LIBRARIES = int(1.2 * 2**30)
"""Bytes of a process with PyTorch and vLLM, which the plan leaves out: `docs/numbers.md`, Evaluations."""


def with_eval_workers(cfg: RunConfig, *, on_gpu: bool | None = None) -> RunConfig:
    """`eval.num_workers: null` as a number. `rollout.engine` must be resolved. `on_gpu`: whether the run has a GPU;
    None to look."""
    if cfg.eval is None or cfg.eval.num_workers is not None:
        return cfg
    if on_gpu is None:
        on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    one = replace(cfg, eval=replace(cfg.eval, num_workers=1))
    none = replace(cfg, eval=replace(cfg.eval, num_workers=0))
    return none if on_gpu or "RAY_ADDRESS" in os.environ or not _has_room(one) else one


def _has_room(cfg: RunConfig) -> bool:
    if any(lacks_for_eval_workers(cfg)) or cfg.rollout.tensor_parallel > 1:
        return False
    capacity = machine_memory(torch.device("cpu"))
    plan = plan_or_none(cfg, Devices(False, capacity))
    if capacity is None or plan is None:
        return False
    planned = sum(place.total for place in plan.places)
    return planned + (num_devices(cfg) + 1) * _LIBRARIES <= _SHARE * capacity  # the driver too
