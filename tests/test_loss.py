"""The objective against float64 formulas written independently, and against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from learner.logprobs import token_logprobs
from learner.loss import GRPOLoss, LossInputs, importance_weights, kl_estimate
from tora.advantage import group_advantages


def test_advantages_by_hand() -> None:
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1], normalize=False), [0.5, -0.5, -0.5, 0.5])
    std = math.sqrt(4 * 0.25 / 3)
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1], normalize=True), np.array([0.5, -0.5, -0.5, 0.5]) / std)
    assert not group_advantages([0.1] * 7, normalize=True).any(), "equal rewards have no advantage, not one of 1e8"


def inputs(count: int = 40, with_ref: bool = True, seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(count, generator=generator) * scale

    learner = -draw(1.0).abs()
    weights = draw(1.0).abs()
    return LossInputs(
        learner_logprobs_N=learner.clone().requires_grad_(),
        proximal_logprobs_N=learner + draw(0.3),
        actor_logprobs_N=learner + draw(0.5),
        ref_logprobs_N=learner + draw(0.4) if with_ref else None,
        advantages_N=draw(1.0),
        weights_N=weights / weights.sum(),
    )


def reference_loss(x: LossInputs, low: float, high: float, kl_coeff: float, kind: str, cap: float | None) -> float:
    """Token by token in float64, straight from the papers' formulas."""
    total = 0.0
    for i in range(len(x.weights_N)):
        new, prox, actor = (
            float(t[i].detach()) for t in (x.learner_logprobs_N, x.proximal_logprobs_N, x.actor_logprobs_N)
        )
        ratio, advantage = math.exp(new - prox), float(x.advantages_N[i])
        surrogate = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        if cap is not None:
            surrogate *= min(math.exp(prox - actor), cap)
        kl = 0.0
        if x.ref_logprobs_N is not None:
            d = float(x.ref_logprobs_N[i]) - new
            kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kind]
        total -= float(x.weights_N[i]) * (surrogate - kl_coeff * kl)
    return total


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("cap", [None, 1.2, 2.0])
def test_loss_equals_the_float64_reference(kind, cap) -> None:
    x = inputs()
    correction = "none" if cap is None else "token_tis"
    loss_fn = GRPOLoss(0.2, 0.28, 0.05, kind, correction, cap or 2.0)
    loss, metrics = loss_fn(x)
    assert loss.item() == pytest.approx(reference_loss(x, 0.2, 0.28, 0.05, kind, cap), abs=1e-6)
    assert metrics["loss/total"].item() == loss.item()
    assert 0 < metrics["loss/clip_share"].item() < 1


def test_gradient_by_hand() -> None:
    """Inside the clip dL/dlogp = -w r A c; outside, on the side that the advantage pushes to, nothing."""
    x = LossInputs(
        learner_logprobs_N=torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True),
        proximal_logprobs_N=torch.tensor([-1.1, -1.5, -1.5, -0.5]),
        actor_logprobs_N=torch.tensor([-1.1, -1.5, -2.5, -0.5]),
        ref_logprobs_N=None,
        advantages_N=torch.tensor([2.0, 1.0, -1.0, -1.0]),
        weights_N=torch.tensor([0.25, 0.25, 0.25, 0.25]),
    )
    loss, _ = GRPOLoss(importance_cap=2.0)(x)
    loss.backward()
    expected = [-0.25 * math.exp(0.1) * 2, 0.0, 0.25 * math.exp(0.5) * 2, 0.0]  # the third: e^1 truncated to 2
    torch.testing.assert_close(x.learner_logprobs_N.grad, torch.tensor(expected))


def test_on_policy_gradient_is_plain_reinforce() -> None:
    x = inputs(with_ref=False)
    on_policy = LossInputs(
        x.learner_logprobs_N,
        x.learner_logprobs_N.detach(),
        x.learner_logprobs_N.detach(),
        None,
        x.advantages_N,
        x.weights_N,
    )
    loss, _ = GRPOLoss()(on_policy)
    loss.backward()
    torch.testing.assert_close(x.learner_logprobs_N.grad, -x.weights_N * x.advantages_N)


def test_micro_batches_add_up_to_the_whole() -> None:
    x = inputs()
    whole, _ = GRPOLoss(kl_coeff=0.1)(x)
    fields = list(LossInputs.__slots__)
    halves = [LossInputs(**{f: getattr(x, f)[part] for f in fields}) for part in (slice(0, 11), slice(11, None))]
    parts = [GRPOLoss(kl_coeff=0.1)(half)[0] for half in halves]
    torch.testing.assert_close(sum(parts), whole)


def test_kl_estimators_agree_with_the_exact_divergence_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, generator=generator).double().log_softmax(0)
    ref = (policy + 0.3 * torch.randn(5, generator=generator).double()).log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum()
    for kind, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.02)):  # k2 is biased, of second order
        mean = (policy.exp() * kl_estimate(policy, ref, kind)).sum()
        assert abs(mean - exact) <= tolerance


def test_importance_weights_are_truncated_constants() -> None:
    learner = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    weights = importance_weights(learner, torch.tensor([0.0, -3.0, 1.0]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, math.exp(-1)]))
    assert not weights.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_log_softmax_with_gradients(monkeypatch, temperature) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 50, bias=False), torch.randn(23, 16, requires_grad=True)
    targets = torch.randint(0, 50, (23,))
    distribution = torch.log_softmax(head(hidden).double() / temperature, 1)
    expected = distribution.gather(1, targets[:, None])[:, 0]
    upstream = torch.randn(23)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [hidden, head.weight])
    for rows in (23, 5):
        monkeypatch.setattr("learner.logprobs._CHUNK_ELEMENTS", rows * 50)
        logprobs, entropy = token_logprobs(head, hidden, targets, temperature=temperature, vocab_size=50)
        torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(entropy.double(), -(distribution.exp() * distribution).sum(1), atol=1e-5, rtol=1e-5)
        gradients = torch.autograd.grad((logprobs * upstream).sum(), [hidden, head.weight])
        for ours, reference in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
