"""Optimizer and learning-rate schedule from the config's components."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tora.config.components import instantiate
from tora.config.schema import Component


def build_optimizer(component: Component, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer. Raises ConfigError if the component cannot be built."""
    return instantiate(component, list(parameters))


def build_schedule(component: Component, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """A schedule to advance once a step. If its constructor takes `num_training_steps`, it receives `num_steps`."""
    return instantiate(component, optimizer, num_training_steps=num_steps)
