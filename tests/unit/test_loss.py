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
from losses import CORRECTED, LOSSES, by_hand, corrected, inputs

from learner.loss import CISPOLoss, DAPOLoss, DPPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss, LossInputs, SAPOLoss
from learner.loss.correction import importance_weights
from learner.loss.objective import clipped_surrogate
from tora.batching.batch import token_weights


def objective(loss: Any, x: LossInputs, t: int, now: Sequence[float], fixed: Sequence[float]) -> float:
    """One token's term of the paper's objective. `now`: the learner's log-probs; `fixed`: under a stop-gradient."""
    proximal, advantage = x.proximal_logprobs_N.tolist(), float(x.advantages_N[t])
    if isinstance(loss, SAPOLoss):  # arXiv:2511.20347
        tau, ratio = 1.0 if advantage > 0 else 1.05, math.exp(now[t]) / math.exp(proximal[t])
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
    lowest, highest = 1 - loss.clip_low, 1 + loss.clip_high
    if isinstance(loss, DPPOLoss):  # arXiv:2602.04879
        p, q = math.exp(fixed[t]), math.exp(proximal[t])
        divergence = abs(p - q) if loss.divergence == "tv" else q * math.log(q / p)
        if loss.divergence == "kl":
            divergence += (1 - q) * math.log((1 - q) / (1 - p))
        bound, further = (loss.clip_high, p > q) if advantage > 0 else (loss.clip_low, p < q)
        return 0.0 if further and divergence > bound else p / q * advantage * (1 + now[t] - fixed[t])
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
    """-Σ w (c · objective - kl_coeff · KL), c = min(π_proximal / π_actor, 2), for GSPO with the sequence's geometric
    mean; 1 for DPPO."""
    fixed, sum_ = x.learner_logprobs_N.tolist(), 0.0
    pairs = zip(x.proximal_logprobs_N.tolist(), x.actor_logprobs_N.tolist(), strict=True)
    ratios = [math.exp(proximal) / math.exp(actor) for proximal, actor in pairs]
    for t in range(len(fixed)):
        ratio = ratios[t]
        if isinstance(loss, GSPOLoss):
            mine = [r for r, b in zip(ratios, x.sequence_N.tolist(), strict=True) if b == x.sequence_N[t]]
            ratio = math.prod(mine) ** (1 / len(mine))
        correction = 1.0 if isinstance(loss, DPPOLoss) else min(ratio, 2.0)
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
    equals_the_formula(x, loss_fn)
    assert loss_class in (CISPOLoss, SAPOLoss) or 0 < loss_fn(x)[1]["loss/clip_share"].item() < 1


def equals_the_formula(x: LossInputs, loss_fn: Any) -> None:
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


@pytest.mark.parametrize("loss_class", LOSSES)
def test_float32_agrees_with_float64(loss_class: Any) -> None:
    exact, single = (loss_class(kl_coeff=0.05)(inputs(loss_class, dtype=d))[0] for d in (torch.float64, torch.float32))
    assert single.item() == pytest.approx(exact.item(), abs=1e-6)


@pytest.mark.parametrize(("loss_class", "correction"), CORRECTED)
def test_on_policy_gradient_is_plain_reinforce(loss_class: Any, correction: str) -> None:
    x = inputs(loss_class, with_ref=False)
    same = x.learner_logprobs_N.detach()
    loss, _ = corrected(loss_class, correction)(replace(x, proximal_logprobs_N=same, actor_logprobs_N=same))
    loss.backward()
    torch.testing.assert_close(x.learner_logprobs_N.grad, -x.weights_N * x.advantages_N)


@pytest.mark.parametrize(("loss_class", "correction"), CORRECTED)
def test_micro_batches_add_up_to_the_whole(loss_class: Any, correction: str) -> None:
    """The loss, every metric and the gradient. Sequences are never split."""
    x = inputs(loss_class)
    loss_fn = corrected(loss_class, correction, kl_coeff=0.1)
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


def test_dppo_by_kl_equals_the_papers_formula() -> None:
    equals_the_formula(inputs(DPPOLoss), DPPOLoss(divergence="kl", clip_low=0.02, clip_high=0.05))


def test_dppo_bounds_the_shift_of_probability_and_not_the_ratio() -> None:
    """0.001 -> 0.01 is a ratio of 10 and a shift of 0.009; 0.6 -> 0.8 is a ratio of 1.33 and a shift of 0.2, and back
    towards the old policy everything may move."""
    old, new = [0.001, 0.6, 0.8, 0.8], [0.01, 0.8, 0.6, 0.6]
    x = by_hand([math.log(p) for p in new], [math.log(p) for p in old], [1.0, 1.0, -1.0, 1.0], [0.25] * 4)
    loss, metrics = DPPOLoss()(x)
    loss.backward()
    torch.testing.assert_close(x.learner_logprobs_N.grad, torch.tensor([-2.5, 0.0, 0.0, -0.25 * 0.75]))
    assert metrics["loss/clip_share"].item() == 0.5
    truncated = by_hand([0.0], [math.log(1e-6)], [-1.0], [1.0])
    assert DPPOLoss()(truncated)[0].item() == pytest.approx(20)
    for divergence in ("tv", "kl"):  # float32's probabilities of 1
        x = by_hand([0.0, -1e-7], [-1e-7, 0.0], [1.0, -1.0], [0.5, 0.5])
        loss, metrics = DPPOLoss(divergence=divergence)(x)
        assert loss.isfinite() and metrics["loss/clip_share"].item() == 0


def test_sapo_fades_instead_of_clipping() -> None:
    """By hand: 4 σ(τ (r - 1)) / τ; the slope in log r is r / cosh²(τ (r - 1) / 2)."""
    x = by_hand([math.log(2), math.log(2), 0.0], [0.0] * 3, [1.0, -1.0, 1.0], [1.0] * 3)
    loss, metrics = SAPOLoss()(x)
    assert loss.item() == pytest.approx(-4 / (1 + math.exp(-1)) + 4 / 1.05 / (1 + math.exp(-1.05)) - 2, rel=1e-6)
    loss.backward()
    expected = [-2 / math.cosh(0.5) ** 2, 2 / math.cosh(0.525) ** 2, -1.0]
    torch.testing.assert_close(x.learner_logprobs_N.grad, torch.tensor(expected))
    assert metrics["loss/clip_share"].item() == 0


@pytest.mark.parametrize("loss_class", [GRPOLoss, DAPOLoss, DrGRPOLoss])
def test_dual_clip_bounds_the_push_of_a_negative_advantage(loss_class: Any) -> None:
    """Ratios 2 and 5, c = 3: max(min(r A, clip(r) A), c A) for A < 0, and nothing else for A > 0."""
    ratios, advantages = [2.0, 5.0, 5.0, 0.5], [-1.0, -1.0, 1.0, -1.0]
    x = by_hand([math.log(r) for r in ratios], [0.0] * 4, advantages, [0.25] * 4)
    plain, dual = loss_class(), loss_class(dual_clip=3.0)
    high = 1 + plain.clip_high
    assert plain(x)[0].item() == pytest.approx(-0.25 * (-2 - 5 + high - 0.8))
    loss, metrics = dual(x)
    assert loss.item() == pytest.approx(-0.25 * (-2 - 3 + high - 0.8))
    loss.backward()
    torch.testing.assert_close(x.learner_logprobs_N.grad, torch.tensor([0.5, 0.0, 0.0, 0.0]))
    assert metrics["loss/clip_share"].item() == 0.75


def test_gspo_is_corrected_by_the_sequences_weight() -> None:
    """Without a clip, GSPO around the learner, corrected, is GSPO around the actor: the two geometric means multiply. A
    weight for each token instead is another objective."""
    x = inputs(GSPOLoss, with_ref=False)
    wide: dict[str, Any] = {"clip_low": 1.0, "clip_high": 1e9}

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, x.learner_logprobs_N)[0]

    exact = gradient(
        GSPOLoss(proximal="actor", importance_correction="none", **wide)(  # type: ignore[arg-type]
            replace(x, proximal_logprobs_N=x.actor_logprobs_N)
        )[0]
    )
    by_sequence = gradient(GSPOLoss(importance_high=1e9, **wide)(x)[0])
    torch.testing.assert_close(by_sequence, exact)
    ratio_B = torch.stack(
        [(x.learner_logprobs_N - x.proximal_logprobs_N)[x.sequence_N == b].mean().exp() for b in range(x.num_sequences)]
    )
    objective_N, _ = clipped_surrogate(ratio_B[x.sequence_N], x.advantages_N, 1.0, 1e9)
    weights_N, _ = importance_weights(x, "token_tis", None, 1e9)
    by_token = gradient(-(x.weights_N * weights_N * objective_N).sum())
    error = float((by_token - exact).norm() / exact.norm())
    assert 0.05 < error < 0.1, f"{error:.3f}"
