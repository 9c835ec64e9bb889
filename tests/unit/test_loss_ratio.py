"""Log-ratios of any size: what is ordinary is unchanged bit for bit, and nothing finite becomes infinite."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from losses import CORRECTED, by_hand, corrected

from learner.loss.kl import kl_estimate, sequence_kl
from learner.loss.ratio import MAX_LOG_RATIO, bounded_exp, bounded_expm1
from learner.mismatch import mismatch

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bounded", "plain"), [(bounded_exp, torch.exp), (bounded_expm1, torch.expm1)])
def test_up_to_the_bound_all_is_exps_bit_for_bit(bounded: Any, plain: Any, dtype: torch.dtype) -> None:
    values = [*torch.linspace(-100, MAX_LOG_RATIO, 2001).tolist(), 0.0, 1e-30, -1e-30, -1e4, MAX_LOG_RATIO]
    ours, theirs = (torch.tensor(values, dtype=dtype, requires_grad=True) for _ in range(2))
    a, b = bounded(ours), plain(theirs)
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_bound_it_is_the_tangent(dtype: torch.dtype) -> None:
    d = torch.tensor([21.0, 88.5, 100.0, 1e4, 1e9], dtype=dtype, requires_grad=True)
    value = bounded_exp(d)
    value.sum().backward()
    slope = math.exp(MAX_LOG_RATIO)
    expected = [slope * (1 + x - MAX_LOG_RATIO) for x in d.tolist()]
    rtol = 2e-2 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(value, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=0)
    torch.testing.assert_close(d.grad, torch.full_like(d, slope), rtol=rtol, atol=0)


@pytest.mark.parametrize("bounded", [bounded_exp, bounded_expm1])
def test_what_is_not_finite_stays_so(bounded: Any) -> None:
    assert bounded(torch.tensor([math.nan])).isnan().all()
    assert bounded(torch.tensor([math.inf])).isinf().all()
    assert bounded(torch.tensor([-math.inf])).item() == (0 if bounded is bounded_exp else -1)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("d", [-1e4, -100.0, 19.0, 21.0, 89.0, 1e4])
def test_kl_estimates_and_their_gradients_are_finite(kind: Any, d: float) -> None:
    """k2 and k3 still pull towards the reference: a token that it thinks more likely must become more likely."""
    logprobs = torch.tensor([-1.0], requires_grad=True)
    ref = torch.tensor([-1.0 + d])
    value = kl_estimate(logprobs, ref, kind)
    (slope,) = torch.autograd.grad(value.sum(), logprobs)
    assert value.isfinite().all() and slope.isfinite().all()
    assert kind == "k1" or slope.sign().item() == -np.sign(d)
    assert sequence_kl(logprobs.detach(), ref, torch.tensor([0]), 1, kind).isfinite().all()


@pytest.mark.parametrize("weight", [0.25, 0.0])
@pytest.mark.parametrize(("loss_class", "correction"), CORRECTED)
def test_losses_are_finite_for_any_log_ratios(loss_class: Any, correction: str, weight: float) -> None:
    """Of learner to proximal, proximal to actor, and reference to learner. A weight of 0: an idle rank's tokens."""
    extremes = [-1e4, -90.0, 90.0, 1e4]
    x = by_hand([-1.0] * 4, [-1.0] * 4, [1.0, -1.0, -1.0, -1.0], [weight] * 4)
    shifted = -1.0 + torch.tensor(extremes)
    loss_fn = corrected(loss_class, correction, kl_coeff=0.1, kl_type="k3")
    for name in ("proximal_logprobs_N", "actor_logprobs_N", "ref_logprobs_N"):
        for values in (shifted, shifted[3:].repeat(4)):  # GSPO's ratio and one mask are of the mean
            loss, metrics = loss_fn(replace(x, **{"ref_logprobs_N": x.actor_logprobs_N, name: values}))
            (gradient,) = torch.autograd.grad(loss, x.learner_logprobs_N)
            assert loss.isfinite() and gradient.isfinite().all(), name
            assert all(value.isfinite() for value in metrics.values()), name
            assert weight or (loss == 0 and (gradient == 0).all())


def test_mismatch_metrics_are_finite_for_any_log_ratios() -> None:
    versions = np.zeros(3, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's, of an overflow
        metrics = mismatch(np.array([0.0, -1e4, 1e4], np.float32), versions)
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["mismatch_max_ratio"] == pytest.approx(math.exp(MAX_LOG_RATIO))
    assert mismatch(np.zeros(0, np.float32), np.zeros(0, np.int64)) == {}
