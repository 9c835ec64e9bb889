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
