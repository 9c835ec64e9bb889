"""Comparisons of named tensors and metrics within a tolerance."""

from __future__ import annotations

import pytest
import torch


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 2e-5) -> None:
    """Raises AssertionError, with the name, if two tensors differ or a name is missing on either side.

    bfloat16 tensors may differ by one unit in the last place, which is where a tie may round either way.
    """
    assert a.keys() == b.keys()
    for name in a:
        rtol = 2**-7 if a[name].dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def compare_metrics(a: dict[str, float], b: dict[str, float], rel: float = 1e-3) -> None:
    """As `compare`, for one step's metrics."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-5), name


def compare_in_bf16(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], share: float
) -> None:
    """Raises AssertionError, with the name, if two tensors are further from each other than `share` of what bf16 costs,
    which is how far `a` is from `exact`, a result in float32. How far apart they are differs between processors."""
    assert a.keys() == b.keys() == exact.keys()
    for name in a:
        a_, b_, exact_ = (each[name].double() for each in (a, b, exact))
        gap, cost = (a_ - b_).norm(), (a_ - exact_).norm()
        assert gap <= share * cost + 1e-9 * exact_.norm(), f"{name}: {gap:g} against {cost:g}"


def compare_metrics_in_bf16(a: dict[str, float], b: dict[str, float], exact: dict[str, float]) -> None:
    """As `compare_metrics`, or within twice what bf16 costs."""
    assert a.keys() == b.keys() == exact.keys()
    for name in a:
        cost = abs(a[name] - exact[name])
        assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5 + 2 * cost), name
