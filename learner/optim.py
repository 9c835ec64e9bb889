"""Optimizer and learning-rate schedule from the config's components, and how a checkpoint restores their settings."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tora.config.calls import call
from tora.config.components import make
from tora.config.schema import Component, RunConfig
from tora.errors import ConfigError

Group = dict[str, Any]


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """What a config says of optimizer and schedule; a checkpoint keeps it, to tell what a resumed run changes."""

    optimizer: Component
    lr_scheduler: Component
    num_steps: int

    @classmethod
    def from_config(cls, cfg: RunConfig) -> OptimizerSettings:
        return cls(cfg.optimizer, cfg.lr_scheduler, cfg.num_steps)


def build_optimizer(component: Component, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Raises ConfigError if the component cannot be built, or if it cannot train weights sharded over ranks and these
    are."""
    trained = list(parameters)
    sharded = next((p for p in trained if isinstance(p, DTensor)), None)
    if sharded is not None:
        _check_sharded(component, sharded)
    optimizer = make(component, "optimizer", trained)
    if not isinstance(optimizer, torch.optim.Optimizer):
        made = type(optimizer).__name__
        raise ConfigError(f"optimizer: {component['_component_']} makes a {made}, expected a torch.optim.Optimizer")
    return optimizer


def _check_sharded(component: Component, like: DTensor) -> None:
    mesh = like.device_mesh
    full = torch.zeros(2 * mesh.size(), 2, dtype=like.dtype, device=like.device)
    probe = torch.nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
    probe.grad = torch.zeros_like(probe)
    try:
        with torch.compiler.set_stance("force_eager"):
            make(component, "optimizer", [probe]).step()
    except RuntimeError as error:
        raise ConfigError(
            f"optimizer._component_={component['_component_']} cannot train weights that are sharded over ranks: "
            f"{str(error).splitlines()[0]} Whole weights in bf16 are sharded on one rank too. Use another optimizer."
        ) from error


def build_schedule(component: Component, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """A schedule for `advance`. If its constructor takes `num_training_steps`, it receives `num_steps`.

    A schedule that starts at 0, as a warm-up does, runs one step ahead, and one step longer: a step at learning rate 0
    would train nothing. So step k of W warm-up steps has (k + 1) / W of the learning rate.
    """
    schedule = _checked(component, make(component, "lr_scheduler", optimizer, num_training_steps=num_steps))
    if any(schedule.get_last_lr()):
        return schedule
    for group in optimizer.param_groups:
        _assign(group, "lr", group["initial_lr"])
    schedule = make(component, "lr_scheduler", optimizer, num_training_steps=num_steps + 1)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no optimizer step came before
        call(component, "lr_scheduler", schedule.step)
    return schedule


_OF_A_SCHEDULE = ("step", "get_last_lr", "state_dict", "load_state_dict")


def _checked(component: Component, schedule: Any) -> Any:
    """Raises ConfigError if it is no schedule, or one that steps by something else than the number of steps."""
    name = f"lr_scheduler: {component['_component_']}"
    if missing := [name for name in _OF_A_SCHEDULE if not hasattr(schedule, name)]:
        raise ConfigError(f"{name} makes a {type(schedule).__name__}, which lacks {', '.join(missing)}")
    try:
        inspect.signature(schedule.step).bind()
    except TypeError as error:
        raise ConfigError(f"{name}: its step() is called without arguments, and it has a {error}") from error
    return schedule


def plain(value: Any) -> Any:
    """The value for JSON: tensors of one element, such as torchao's learning rates, become numbers."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def restore_settings(
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    saved_groups: Sequence[Group],
    saved_schedule: Mapping[str, Any],
    *,
    before: OptimizerSettings | None,
    now: OptimizerSettings,
    version: int,
) -> None:
    """Restore the optimizer's groups and the schedule, both newly built, as of policy version `version`.

    What the config has changed since `before` (None: nothing) keeps the config's value. If the learning rate or its
    schedule has changed, the schedule is advanced from its start, and so continues as if it had been this one always.
    """
    fresh = [_copy(group) for group in optimizer.param_groups]
    changed: set[str] = set()
    new_schedule = False
    if before is not None:
        names = before.optimizer.keys() | now.optimizer.keys()
        changed = {name for name in names if before.optimizer.get(name) != now.optimizer.get(name)}
        new_schedule = "lr" in changed or (before.lr_scheduler, before.num_steps) != (now.lr_scheduler, now.num_steps)
    if new_schedule:
        for _ in range(version):
            advance(now.lr_scheduler, schedule)
    else:
        schedule.load_state_dict({**schedule.state_dict(), **saved_schedule})
    for group, start, saved in zip(optimizer.param_groups, fresh, saved_groups, strict=True):
        scheduled = {"lr", "initial_lr", *(key for key in start if group[key] != start[key])} if new_schedule else set()
        for key, value in saved.items():
            if key != "params" and key not in changed | scheduled:
                _assign(group, key, value)


def _copy(group: Group) -> Group:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}


def _assign(group: Group, key: str, value: Any) -> None:
    """As the optimizer holds it: a tensor keeps its place, and a tuple stays one."""
    if isinstance(group.get(key), torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def advance(component: Component, schedule: Any) -> None:
    """One step of the component's schedule. Without torch's warning that the optimizer has not stepped yet: a run's
    first step may have nothing to train, or be left out. Raises ComponentError if it raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
        call(component, "lr_scheduler", schedule.step)
