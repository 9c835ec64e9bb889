"""The learning rate of each step, for schedules as a config names them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from learner.optim import build_optimizer, build_schedule

ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-3}


def rates(name: str, num_steps: int, **arguments: Any) -> list[float]:
    """The learning rate of each step, in units of the configured one."""
    optimizer = build_optimizer(ADAMW, [torch.nn.Parameter(torch.ones(1))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = build_schedule({"_component_": name, **arguments}, optimizer, num_steps)
        found = []
        for _ in range(num_steps):
            found.append(schedule.get_last_lr()[0] / 1e-3)
            assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
    return found


def test_a_constant_rate_is_warmed_up_in_as_many_steps_as_asked_for() -> None:
    found = rates("transformers.get_constant_schedule_with_warmup", 6, num_warmup_steps=4)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_a_decay_after_a_warm_up_moves_at_both_ends() -> None:
    found = rates("transformers.get_linear_schedule_with_warmup", 6, num_warmup_steps=2)
    assert found == pytest.approx([1 / 2, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    cosine = rates("transformers.get_cosine_schedule_with_warmup", 4, num_warmup_steps=1)
    assert cosine == pytest.approx([1, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3))])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("transformers.get_constant_schedule_with_warmup", {"num_warmup_steps": 0}),
        ("transformers.get_cosine_schedule_with_warmup", {"num_warmup_steps": 0}),
        ("transformers.get_linear_schedule_with_warmup", {"num_warmup_steps": 0}),
        ("torch.optim.lr_scheduler.ExponentialLR", {"gamma": 0.9}),
        ("torch.optim.lr_scheduler.LinearLR", {"start_factor": 0.1}),
    ],
)
def test_a_schedule_that_starts_above_0_is_as_its_library_has_it(name: str, arguments: dict[str, Any]) -> None:
    optimizer = build_optimizer(ADAMW, [torch.nn.Parameter(torch.ones(1))])
    module, _, function = name.rpartition(".")
    takes_steps = module == "transformers" and "constant" not in function
    extra = {"num_training_steps": 5} if takes_steps else {}
    schedule = getattr(__import__(module, fromlist=[function]), function)(optimizer, **arguments, **extra)
    theirs = []
    for _ in range(5):
        theirs.append(schedule.get_last_lr()[0] / 1e-3)
        optimizer.step()
        schedule.step()
    assert rates(name, 5, **arguments) == theirs


@pytest.mark.parametrize("steps", [1, 3])
def test_a_resumed_schedule_continues(steps: int) -> None:
    component = {"_component_": "transformers.get_linear_schedule_with_warmup", "num_warmup_steps": 2}

    def build() -> tuple[Any, Any]:
        optimizer = build_optimizer(ADAMW, [torch.nn.Parameter(torch.ones(1))])
        return optimizer, build_schedule(component, optimizer, 6)

    (first, unbroken), (second, resumed) = build(), build()
    for _ in range(steps):
        first.step()
        unbroken.step()
    resumed.load_state_dict(
        {k: v for k, v in unbroken.state_dict().items() if k != "lr_lambdas"} | {"lr_lambdas": [None]}
    )
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
    for optimizer, schedule in ((first, unbroken), (second, resumed)):
        optimizer.step()
        schedule.step()
    assert resumed.get_last_lr() == unbroken.get_last_lr()
