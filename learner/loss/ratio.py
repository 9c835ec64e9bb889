"""exp of a log-ratio, for every loss, correction and KL estimate.

exp overflows float32 at 88.7, and an infinite term makes the whole step's gradient NaN, even with a weight of zero.
"""

from __future__ import annotations

import math

import torch

MAX_LOG_RATIO = 20.0
"""The log-ratio, in nats, above which the tangent replaces exp: a ratio of 4.9e8. Published bounds on a ratio are at
most 5, and the sum of squares in the gradient's norm stays far below float32's largest number. verl and SkyRL clamp
log-ratios here too."""
_SLOPE = math.exp(MAX_LOG_RATIO)


def bounded_exp(d: torch.Tensor) -> torch.Tensor:
    """exp(d) up to `MAX_LOG_RATIO`, its tangent at that point beyond: finite, with a finite slope, and growing.

    A constant instead of the tangent would have no gradient where a policy is farthest from the other. NaN stays NaN.
    """
    return d.clamp_max(MAX_LOG_RATIO).exp() + _beyond(d)


def bounded_expm1(d: torch.Tensor) -> torch.Tensor:
    """`bounded_exp(d)` - 1, without the rounding of small d."""
    return d.clamp_max(MAX_LOG_RATIO).expm1() + _beyond(d)


def _beyond(d: torch.Tensor) -> torch.Tensor:
    return (d - MAX_LOG_RATIO).relu() * _SLOPE
