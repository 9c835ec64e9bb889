"""The terms that losses share: importance correction, KL estimators in loss and reward, and validation of settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from losses import LOSSES, by_hand, corrected, inputs

from learner.loss import CISPOLoss, DAPOLoss, DPPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss, LossInputs, SAPOLoss
from learner.loss.correction import BOUNDS, importance_weights
from learner.loss.kl import kl_estimate, sequence_kl
from tora.errors import ConfigError


def two_sequences(log_ratios: list[float], lengths: list[int]) -> LossInputs:
    """Sequences with the given proximal minus actor log-probs."""
    count = len(log_ratios)
    x = by_hand([-1.0] * count, [-1.0] * count, [1.0] * count, [1 / count] * count)
    sequence_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    actor = -1.0 - torch.tensor(log_ratios)
    return replace(x, actor_logprobs_N=actor, sequence_N=sequence_N, num_sequences=len(lengths))


@pytest.mark.parametrize(
    ("kind", "bounds", "expected", "is_cut"),
    [
        ("none", (None, None), [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
        ("token_tis", (None, None), [2, 0.25, 1, 1.5, 2], [1, 0, 0, 0, 0]),
        ("token_tis", (None, 1.25), [1.25, 0.25, 1, 1.25, 1.25], [1, 0, 0, 1, 1]),
        ("token_mask", (None, None), [4, 0, 1, 1.5, 2], [0, 1, 0, 0, 0]),
        ("token_mask", (0.2, 1.75), [0, 0.25, 1, 1.5, 0], [1, 0, 0, 0, 1]),
        ("sequence_tis", (None, None), [1, 1, *[3 ** (1 / 3)] * 3], [0, 0, 0, 0, 0]),
        ("sequence_tis", (None, 1.25), [1, 1, 1.25, 1.25, 1.25], [0, 0, 1, 1, 1]),
        ("sequence_mask", (None, None), [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]),
        ("sequence_mask", (0.5, 2.0), [1, 1, *[3 ** (1 / 3)] * 3], [0, 0, 0, 0, 0]),
    ],
)
def test_importance_weights_by_hand(kind: Any, bounds: Any, expected: list[float], is_cut: list[int]) -> None:
    """Ratios 4 and 1/4 in one sequence (geometric mean 1); 1, 3/2 and 2 in another (geometric mean 3^(1/3))."""
    x = two_sequences([math.log(r) for r in (4, 0.25, 1, 1.5, 2)], [2, 3])
    weights, cut = importance_weights(x, kind, *bounds)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert cut.tolist() == [bool(c) for c in is_cut]


@pytest.mark.parametrize("loss_class", LOSSES)
def test_corrections_equal_the_float64_reference_in_a_loss(loss_class: Any) -> None:
    """The loss is linear in a token's weight, so its gradient there is -c · objective, which shows the correction c."""
    x = inputs(loss_class, with_ref=False)
    weights_N = x.weights_N.clone().requires_grad_()
    x = replace(x, weights_N=weights_N)
    sequence_N, low, high = x.sequence_N.tolist(), 0.8, 1.1
    pairs = zip(x.proximal_logprobs_N.tolist(), x.actor_logprobs_N.tolist(), strict=True)
    ratios = [math.exp(proximal) / math.exp(actor) for proximal, actor in pairs]
    members = [[r for r, b in zip(ratios, sequence_N, strict=True) if b == s] for s in range(x.num_sequences)]
    means = [math.prod(members[b]) ** (1 / len(members[b])) for b in sequence_N]
    bounds = {"importance_low": low, "importance_high": high}
    expected = {
        "token_tis": (ratios, [min(r, high) for r in ratios], {"importance_high": high}),
        "token_mask": (ratios, [r * (low <= r <= high) for r in ratios], bounds),
        "sequence_tis": (means, [min(r, high) for r in means], {"importance_high": high}),
        "sequence_mask": (means, [r * (low <= r <= high) for r in means], bounds),
    }
    plain, metrics = corrected(loss_class, "none")(x)
    (slopes,) = torch.autograd.grad(plain, weights_N)
    assert metrics["importance/cut_share"].item() == 0
    for kind in loss_class.corrections[1:]:
        free, weights, settings = expected[kind]
        loss, metrics = corrected(loss_class, kind, **settings)(x)
        (gradient,) = torch.autograd.grad(loss, weights_N)
        torch.testing.assert_close(gradient, slopes * torch.tensor(weights, dtype=torch.float64))
        cut = sum(s for s, r, w in zip(x.shares_N.tolist(), free, weights, strict=True) if r != w)
        assert 0 < cut < 1 and metrics["importance/cut_share"].item() == pytest.approx(cut)


def test_importance_weights_are_constants_and_survive_extremes() -> None:
    x = two_sequences([200.0, -200.0, 0.0], [1, 2])
    proximal = x.proximal_logprobs_N.clone().requires_grad_()
    for kind in BOUNDS:
        weights, _ = importance_weights(replace(x, proximal_logprobs_N=proximal), kind, None, None)  # type: ignore[arg-type]
        assert not weights.requires_grad and weights.isfinite().all(), kind


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_kl_is_added_to_the_loss_and_only_reported_for_the_reward(loss_class: Any, kind: Any) -> None:
    x = inputs(loss_class)
    assert x.ref_logprobs_N is not None
    policy, _ = loss_class()(replace(x, ref_logprobs_N=None))
    (plain,) = torch.autograd.grad(policy, x.learner_logprobs_N)
    kl, mean, slopes = 0.0, 0.0, []
    for weight, share, learner, ref in zip(
        *(t.tolist() for t in (x.weights_N, x.shares_N, x.learner_logprobs_N, x.ref_logprobs_N)), strict=True
    ):
        d = ref - learner
        value = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kind]
        slopes.append(weight * {"k1": 1.0, "k2": -d, "k3": 1 - math.exp(d)}[kind])
        kl, mean = kl + weight * value, mean + share * value
    loss, metrics = loss_class(kl_coeff=0.3, kl_type=kind)(x)
    assert loss.item() == pytest.approx(policy.item() + 0.3 * kl, abs=1e-13)
    assert metrics["kl/mean"].item() == pytest.approx(mean, abs=1e-13)
    (gradient,) = torch.autograd.grad(loss, x.learner_logprobs_N)
    torch.testing.assert_close(gradient, plain + 0.3 * torch.tensor(slopes, dtype=torch.float64))

    loss, metrics = loss_class(kl_coeff=0.3, kl_type=kind, kl_in="reward")(x)
    assert loss.item() == policy.item() and metrics["kl/mean"].item() == pytest.approx(mean, abs=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss, x.learner_logprobs_N)[0], plain, rtol=0, atol=0)


def test_the_default_estimator_depends_on_where_the_kl_is_applied() -> None:
    x = inputs()
    for place, kind in (("loss", "k3"), ("reward", "k1")):
        default, named = (GRPOLoss(kl_coeff=0.3, kl_in=place, kl_type=k)(x)[1] for k in (None, kind))  # type: ignore[arg-type]
        assert default["kl/mean"] == named["kl/mean"]


def test_kl_estimators_agree_with_the_exact_divergence_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, generator=generator).double().log_softmax(0)
    ref = (policy + 0.3 * torch.randn(5, generator=generator).double()).log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum()
    for kind, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.02)):  # k2 is biased, of second order
        mean = (policy.exp() * kl_estimate(policy, ref, kind)).sum()  # type: ignore[arg-type]
        assert abs(mean - exact) <= tolerance


def test_a_sequences_kl_is_the_sum_over_its_tokens() -> None:
    x = inputs(dtype=torch.float32)
    assert x.ref_logprobs_N is not None
    sums = [0.0] * x.num_sequences
    for b, actor, ref in zip(*(t.tolist() for t in (x.sequence_N, x.actor_logprobs_N, x.ref_logprobs_N)), strict=True):
        sums[b] += actor - ref
    found = sequence_kl(x.actor_logprobs_N, x.ref_logprobs_N, x.sequence_N, x.num_sequences, "k1")
    assert found.tolist() == pytest.approx(sums, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_type": "k4"}, "loss.kl_type=k4 must be one of k1, k2, k3"),
        ({"kl_in": "rewards"}, "the nearest is reward"),
        ({"importance_correction": "tis"}, "loss.importance_correction=tis must be one of none, token_tis"),
        ({"kl_coeff": -0.1}, "loss.kl_coeff=-0.1 must be a number of at least 0"),
        ({"entropy_coeff": math.nan}, "loss.entropy_coeff=nan must be a number of at least 0"),
        ({"clip_high": "much"}, "loss.clip_high=much must be a number"),
        ({"importance_low": 0.5}, "importance_low=0.5 bounds the masks"),
        ({"importance_correction": "none", "importance_high": 3}, "importance_correction is none"),
        ({"importance_correction": "token_mask", "importance_low": 6}, "importance_low=6 must be less than"),
        ({"importance_correction": "sequence_mask", "importance_high": 0.9}, "must be less than importance_high=0.9"),
        ({"importance_high": 0}, "must be less than importance_high=0"),
    ],
)
@pytest.mark.parametrize("loss_class", [GRPOLoss, DrGRPOLoss, DAPOLoss, CISPOLoss])
def test_invalid_settings_are_refused(loss_class: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loss_class(**settings)
    assert words in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: GSPOLoss(importance_correction="token_tis"),
            "loss.importance_correction=token_tis must be one of none, sequence_tis, sequence_mask with GSPOLoss",
        ),
        (lambda: DPPOLoss(divergence="js"), "loss.divergence=js must be one of tv, kl"),  # type: ignore[arg-type]
        (lambda: DPPOLoss(ratio_high=math.nan), "loss.ratio_high=nan must be a number of at least 1"),
        (lambda: DPPOLoss(importance_correction="token_tis"), "loss.proximal=actor needs importance_correction=none"),
        (lambda: SAPOLoss(tau_positive=0), "loss.tau_positive=0 must be a number greater than 0"),
        (lambda: SAPOLoss(tau_negative=math.nan), "loss.tau_negative=nan must be a number greater than 0"),
        (lambda: GRPOLoss(dual_clip=1.0), "loss.dual_clip=1.0 must be a number greater than 1"),
        (lambda: GRPOLoss(dual_clip=math.nan), "loss.dual_clip=nan must be a number greater than 1"),
        (lambda: GRPOLoss(kl_weighted=True, kl_in="reward"), "loss.kl_weighted=true weighs the KL in the loss"),
    ],
)
def test_settings_of_one_loss_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert words in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("proximal", ["learner", "actor"])
def test_a_weighted_kl_has_the_gradient_of_the_divergence_from_the_learners_samples(proximal: Any) -> None:
    """A policy of five tokens, all of them sampled by the actor in proportion to its own probabilities."""
    generator = torch.Generator().manual_seed(0)
    learner, actor, ref = (torch.randn(5, generator=generator).double().log_softmax(0) for _ in range(3))
    logits = learner.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    found = {}
    for weighted in (True, False):
        logprobs = logits.log_softmax(0)
        x = LossInputs(
            learner_logprobs_N=logprobs,
            proximal_logprobs_N=actor if proximal == "actor" else learner,
            actor_logprobs_N=actor,
            ref_logprobs_N=ref,
            entropy_N=torch.zeros(5, dtype=torch.float64),
            advantages_N=torch.zeros(5, dtype=torch.float64),
            weights_N=actor.exp(),
            shares_N=actor.exp(),
            sequence_N=torch.arange(5),
            num_sequences=5,
        )
        correction = {"importance_correction": "none"} if proximal == "actor" else {"importance_high": 1e9}
        loss, _ = GRPOLoss(kl_coeff=1.0, kl_weighted=weighted, proximal=proximal, **correction)(x)  # type: ignore[arg-type]
        found[weighted] = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(found[True], exact)
    assert not torch.allclose(found[False], exact, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_an_entropy_bonus_is_the_mean_over_tokens_whatever_the_normalisation(
    loss_class: Any, dtype: torch.dtype
) -> None:
    x = inputs(loss_class, dtype=dtype)
    entropy_N = x.entropy_N.clone().requires_grad_()
    x = replace(x, entropy_N=entropy_N)
    plain, with_bonus = (loss_class(entropy_coeff=coeff)(x) for coeff in (0.0, 0.3))
    mean = sum(s * h for s, h in zip(x.shares_N.tolist(), entropy_N.tolist(), strict=True))
    tolerance = 1e-13 if dtype is torch.float64 else 1e-6
    assert with_bonus[0].item() == pytest.approx(plain[0].item() - 0.3 * mean, abs=tolerance)
    (gradient,) = torch.autograd.grad(with_bonus[0], entropy_N, retain_graph=True)
    torch.testing.assert_close(gradient, -0.3 * x.shares_N)
    assert with_bonus[1]["loss/policy"] == plain[1]["loss/policy"]
