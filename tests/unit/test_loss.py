"""The losses against the papers' formulas, written out token by token in float64, and against hand-worked values.

Shape letters: N response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from losses import LOSSES, by_hand, inputs

from learner.loss import CISPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss, LossInputs
from tora.batching.batch import token_weights


def objective(loss: Any, x: LossInputs, t: int, now: Sequence[float], fixed: Sequence[float]) -> float:
    """One token's term of the paper's objective. `now`: the learner's log-probs; `fixed`: under a stop-gradient."""
    proximal, advantage = x.proximal_logprobs_N.tolist(), float(x.advantages_N[t])
    lowest, highest = 1 - loss.clip_low, 1 + loss.clip_high
    if isinstance(loss, CISPOLoss):  # MiniMax-M1, eq. 4 and 5
        ratio = math.exp(fixed[t] - proximal[t])
        return min(max(ratio, lowest), highest) * advantage * now[t]
    if isinstance(loss, GSPOLoss):  # eq. 7: (π(y) / π_old(y)) ** (1 / |y|)
        mine = [s for s, b in enumerate(x.sequence_N.tolist()) if b == x.sequence_N[t]]
        product = math.prod(math.exp(now[s]) for s in mine) / math.prod(math.exp(proximal[s]) for s in mine)
        ratio = product ** (1 / len(mine))
    else:
        ratio = math.exp(now[t]) / math.exp(proximal[t])
    return min(ratio * advantage, min(max(ratio, lowest), highest) * advantage)


def reference_loss(loss: Any, x: LossInputs, now: Sequence[float]) -> float:
    """-Σ w (c · objective - kl_coeff · KL), c = min(π_proximal / π_actor, 2)."""
    fixed, sum_ = x.learner_logprobs_N.tolist(), 0.0
    for t in range(len(fixed)):
        proximal, actor = float(x.proximal_logprobs_N[t]), float(x.actor_logprobs_N[t])
        correction = min(math.exp(proximal) / math.exp(actor), 2.0)
        kl = 0.0
        if x.ref_logprobs_N is not None:
            fraction = math.exp(float(x.ref_logprobs_N[t])) / math.exp(now[t])
            kl = fraction - math.log(fraction) - 1  # Shao et al. 2024, eq. 4
        sum_ -= float(x.weights_N[t]) * (correction * objective(loss, x, t, now, fixed) - loss.kl_coeff * kl)
    return sum_


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_value_and_gradient_equal_the_papers_formula(loss_class: Any, seed: int) -> None:
    x, loss_fn = inputs(loss_class, seed=seed), loss_class(kl_coeff=0.05)
    loss, metrics = loss_fn(x)
    now = x.learner_logprobs_N.tolist()
    assert loss.item() == pytest.approx(reference_loss(loss_fn, x, now), abs=1e-13)
    loss.backward()
    assert x.learner_logprobs_N.grad is not None
    for t, found in enumerate(x.learner_logprobs_N.grad.tolist()):
        up, down = ([*now[:t], now[t] + step, *now[t + 1 :]] for step in (1e-6, -1e-6))
        slope = (reference_loss(loss_fn, x, up) - reference_loss(loss_fn, x, down)) / 2e-6
        assert found == pytest.approx(slope, abs=1e-8), t
    assert metrics["loss/total"].item() == loss.item()
    assert loss_class is CISPOLoss or 0 < metrics["loss/clip_share"].item() < 1


@pytest.mark.parametrize("loss_class", LOSSES)
def test_float32_agrees_with_float64(loss_class: Any) -> None:
    exact, single = (loss_class(kl_coeff=0.05)(inputs(loss_class, dtype=d))[0] for d in (torch.float64, torch.float32))
    assert single.item() == pytest.approx(exact.item(), abs=1e-6)


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("correction", ["none", "token_tis", "token_mask", "sequence_mask"])
def test_on_policy_gradient_is_plain_reinforce(loss_class: Any, correction: str) -> None:
    x = inputs(loss_class, with_ref=False)
    same = x.learner_logprobs_N.detach()
    loss, _ = loss_class(importance_correction=correction)(replace(x, proximal_logprobs_N=same, actor_logprobs_N=same))
    loss.backward()
    torch.testing.assert_close(x.learner_logprobs_N.grad, -x.weights_N * x.advantages_N)


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("correction", ["token_tis", "sequence_mask"])
def test_micro_batches_add_up_to_the_whole(loss_class: Any, correction: str) -> None:
    """The loss, every metric and the gradient. Sequences are never split."""
    x = inputs(loss_class)
    loss_fn = loss_class(kl_coeff=0.1, importance_correction=correction)
    whole, metrics = loss_fn(x)
    (gradient,) = torch.autograd.grad(whole, x.learner_logprobs_N)
    sum_, parts, gradients = 0.0, dict.fromkeys(metrics, 0.0), torch.zeros_like(gradient)
    for first, last in ((0, 2), (2, 3), (3, 6)):
        mine = (x.sequence_N >= first) & (x.sequence_N < last)
        tensors = {name: getattr(x, name)[mine] for name in LossInputs.__slots__ if name != "num_sequences"}
        tensors["sequence_N"] = tensors["sequence_N"] - first
        loss, part = loss_fn(LossInputs(num_sequences=last - first, **tensors))
        gradients += torch.autograd.grad(loss, x.learner_logprobs_N)[0]
        sum_ += loss.item()
        parts = {name: value + part[name].item() for name, value in parts.items()}
    assert sum_ == pytest.approx(whole.item(), abs=1e-14)
    assert parts == pytest.approx({name: value.item() for name, value in metrics.items()}, abs=1e-14)
    torch.testing.assert_close(gradients, gradient)


def test_grpo_by_hand() -> None:
    """Inside the clip range dL/dlogp = -w r A c; beyond it, in the direction of the advantage, it is zero."""
    x = by_hand([-1.0] * 4, [-1.1, -1.5, -1.5, -0.5], [2.0, 1.0, -1.0, -1.0], [0.25] * 4)
    x = replace(x, actor_logprobs_N=torch.tensor([-1.1, -1.5, -2.5, -0.5]))
    loss, metrics = GRPOLoss()(x)
    terms = [math.exp(0.1) * 2, 1.2, -math.exp(0.5) * 2, -0.8]  # the third's e^1 truncated to 2
    assert loss.item() == pytest.approx(-0.25 * sum(terms))
    loss.backward()
    expected = [-0.25 * math.exp(0.1) * 2, 0.0, 0.25 * math.exp(0.5) * 2, 0.0]
    torch.testing.assert_close(x.learner_logprobs_N.grad, torch.tensor(expected))
    assert (metrics["loss/clip_share"].item(), metrics["importance/cut_share"].item()) == (0.5, 0.25)


def test_dapo_clips_higher_than_grpo() -> None:
    ratio = math.log(1.25)
    x = by_hand([ratio, -ratio], [0.0, 0.0], [1.0, -1.0], [0.5, 0.5])
    assert DAPOLoss()(x)[0].item() == pytest.approx(-0.5 * (1.25 - 0.8))
    assert GRPOLoss()(x)[0].item() == pytest.approx(-0.5 * (1.2 - 0.8))
    above = by_hand([math.log(1.3)], [0.0], [1.0], [1.0])
    assert DAPOLoss()(above)[0].item() == pytest.approx(-1.28)


def test_dr_grpo_weighs_a_completion_by_its_length() -> None:
    """Two sequences of 1 and 3 tokens with advantages +-0.5. The limit is 4 tokens: each token weighs 1 / (2 · 4)."""
    lengths, advantages = [1, 3], [0.5, -0.5]
    weights = torch.tensor(token_weights(lengths, "constant", 4)).repeat_interleave(torch.tensor(lengths))
    x = by_hand([-1.0] * 4, [-1.0] * 4, [advantages[0], *[advantages[1]] * 3], weights.tolist())
    loss, _ = DrGRPOLoss()(x)
    assert loss.item() == pytest.approx(-(0.5 * 1 - 0.5 * 3) / 8)


def test_gspo_clips_whole_sequences() -> None:
    """Each token's log-ratio is far outside the clip range. Only the mean counts: 5e-4 is outside, 3e-4 is not."""
    x = by_hand([0.01, -0.009], [0.0, 0.0], [1.0, 1.0], [0.5, 0.5])
    loss, metrics = GSPOLoss()(x)
    assert loss.item() == pytest.approx(-(1 + 4e-4)) and metrics["loss/clip_share"].item() == 1
    x = by_hand([0.01, -0.0094], [0.0, 0.0], [1.0, 1.0], [0.5, 0.5])
    loss, metrics = GSPOLoss()(x)
    assert loss.item() == pytest.approx(-math.exp(3e-4)) and metrics["loss/clip_share"].item() == 0
    loss.backward()
    torch.testing.assert_close(x.learner_logprobs_N.grad, torch.full((2,), -0.5 * math.exp(3e-4)))


def test_cispo_bounds_the_weight_and_keeps_the_gradient() -> None:
    """Ratio e^2 is bounded to 5, e^-1 has no bound. The gradient is -w · ratio · A, where PPO's clip would give 0."""
    x = by_hand([-1.0, -2.0], [-3.0, -1.0], [1.0, -1.0], [0.5, 0.5])
    loss, metrics = CISPOLoss()(x)
    assert loss.item() == pytest.approx(-0.5 * (5 * 1 * -1.0 + math.exp(-1) * -1 * -2.0))
    loss.backward()
    torch.testing.assert_close(x.learner_logprobs_N.grad, torch.tensor([-2.5, 0.5 * math.exp(-1)]))
    assert metrics["loss/clip_share"].item() == 0.5
