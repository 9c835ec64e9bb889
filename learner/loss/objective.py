"""The terms that losses share: clipped surrogate, importance correction and KL, and how they combine into a loss.

Shape letters: N response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch

from learner.loss.correction import BOUNDS, Correction, importance_weights
from learner.loss.inputs import LossInputs
from learner.loss.kl import KLPlace, KLType, kind_of, kl_estimate
from learner.loss.protocol import LossOutput, Proximal, ReferenceKind
from learner.loss.ratio import bounded_exp
from tora.errors import ConfigError, nearest


@dataclass(frozen=True)
class Terms:
    """Settings that all losses share. Raises ConfigError if a value is out of range."""

    requires: ClassVar[Mapping[str, str | bool]] = {}
    """Config keys, and the only value of each with which a subclass is the objective of its paper. `tora.config.rules`
    reads it from the source without importing the class, so a subclass must assign a literal."""
    corrections: ClassVar[tuple[str, ...]] = get_args(Correction)
    """The values of `importance_correction` that a subclass can be combined with."""
    kl_coeff: float = 0.0
    """β, the coefficient of the KL term; 0 disables it, and no reference log-probs are computed."""
    kl_type: KLType | None = None
    """The KL estimator; null means k3 in the loss and k1 in the reward."""
    kl_in: KLPlace = "loss"
    """`reward`: β Σ_t KL_t is subtracted from a sequence's reward before its group's advantages are computed."""
    entropy_coeff: float = 0.0
    """Coefficient of the entropy bonus: the mean entropy, in nats a token, is subtracted from the loss. The mean is
    weighted by `loss_normalization`, so the coefficient has the same meaning with each."""
    kl_weighted: bool = False
    """Multiply the KL of each token in the loss by π_learner / π_actor (its part π_proximal / π_actor as the importance
    correction bounds it), so that its gradient is that of the divergence from the learner's own samples (DeepSeek-AI
    2025, DeepSeek-V3.2, arXiv:2512.02556, "unbiased KL estimate")."""
    reference: ReferenceKind = "initial"
    """The policy that the KL term pulls to. `initial`: the policy as training began, with the adapter of
    `model.adapter_path`; `base`: the base model without one. They differ only in runs that start from an adapter."""
    proximal: Proximal = "learner"
    """The policy to clip around. `learner`: the policy at the start of the step, with the importance correction
    accounting for its distance from the actor's; the decoupled objective (Hilton et al. 2021, arXiv:2110.00641; Fu et
    al. 2025, AReaL, arXiv:2505.24298). `actor`: the policy that sampled, so that one ratio is both importance weight
    and clipped, as in PPO."""
    importance_correction: Correction = "token_tis"
    """For the gap between learner and actor, see `learner.loss.correction`."""
    importance_low: float | None = None
    """Lower bound of the two masks; null means the published value."""
    importance_high: float | None = None
    """Upper bound; null means the published value."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Clip(Terms):
    """Bounds that a loss clips by."""

    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2


def policy_ratio(x: LossInputs) -> torch.Tensor:
    """π_learner / π_proximal of each token, [N]."""
    return bounded_exp(x.learner_logprobs_N - x.proximal_logprobs_N)


def clipped_surrogate(
    ratio_N: torch.Tensor, advantages_N: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), [N], and the tokens where the clipped term is the smaller, [N]
    bool (PPO, Schulman et al. 2017, arXiv:1707.06347, eq. 7)."""
    unclipped_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N
    return torch.minimum(unclipped_N, clipped_N), clipped_N < unclipped_N


def total(terms: Terms, x: LossInputs, objective_N: torch.Tensor, is_clipped_N: torch.Tensor) -> LossOutput:
    """-Σ w c · objective + β Σ w KL - η Σ s H, with token weights w, their shares s, importance correction c, entropies
    H and η the `entropy_coeff`; the KL sum only if `kl_in` is `loss`, and with w c r for w if `kl_weighted`.

    Metrics: `loss/policy` and `loss/total`; `loss/clip_share` and `importance/cut_share`, the shares of tokens that
    are clipped, and that the correction truncates or masks; `kl/mean`, the mean KL a token.
    """
    correction_N, is_cut_N = importance_weights(
        x, terms.importance_correction, terms.importance_low, terms.importance_high
    )
    loss = -(x.weights_N * correction_N * objective_N).sum()
    metrics = {
        "loss/policy": loss.detach(),
        "loss/clip_share": (x.shares_N * is_clipped_N).sum(),
        "importance/cut_share": (x.shares_N * is_cut_N).sum(),
    }
    if x.ref_logprobs_N is not None:
        kl_N = kl_estimate(x.learner_logprobs_N, x.ref_logprobs_N, kind_of(terms.kl_type, terms.kl_in))
        metrics["kl/mean"] = (x.shares_N * kl_N.detach()).sum()
        if terms.kl_weighted:
            kl_N = kl_N * correction_N * policy_ratio(x)
        if terms.kl_in == "loss":
            loss = loss + terms.kl_coeff * (x.weights_N * kl_N).sum()
    if terms.entropy_coeff:
        loss = loss - terms.entropy_coeff * (x.shares_N * x.entropy_N).sum()
    metrics["loss/total"] = loss.detach()
    return loss, metrics


@dataclass(frozen=True)
class TokenClip(Clip):
    """PPO's clipped surrogate per token."""

    dual_clip: float | None = None
    """c > 1: for a negative advantage the surrogate is at least c A, so that a token that has become c times as likely
    stops pushing (dual clip, Ye et al. 2020, arXiv:1912.09729). verl's `clip_ratio_c`, TRL's `delta`. null:
    none."""

    def __call__(self, x: LossInputs) -> LossOutput:
        objective_N, is_clipped_N = clipped_surrogate(policy_ratio(x), x.advantages_N, self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            lowest_N = self.dual_clip * x.advantages_N
            is_dual_N = (x.advantages_N < 0) & (objective_N < lowest_N)
            objective_N, is_clipped_N = torch.where(is_dual_N, lowest_N, objective_N), is_clipped_N | is_dual_N
        return total(self, x, objective_N, is_clipped_N)


def _check(terms: Terms) -> None:
    """Raises ConfigError if a setting is out of range or contradicts another."""
    _one_of("kl_type", terms.kl_type, (None, *get_args(KLType)))
    _one_of("kl_in", terms.kl_in, get_args(KLPlace))
    _one_of("reference", terms.reference, get_args(ReferenceKind))
    _one_of("proximal", terms.proximal, get_args(Proximal))
    _one_of("importance_correction", terms.importance_correction, get_args(Correction))
    low, high = terms.importance_low, terms.importance_high
    numbers = {
        name: getattr(terms, name)
        for name in ("clip_low", "clip_high", "kl_coeff", "entropy_coeff")
        if hasattr(terms, name)
    }
    for name, value in (numbers | {"importance_low": low or 0, "importance_high": high or 0}).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(f"loss.{name}={value} must be a number of at least 0.")
    dual_clip = getattr(terms, "dual_clip", None)
    if dual_clip is not None and not 1 < dual_clip < float("inf"):
        raise ConfigError(f"loss.dual_clip={dual_clip} must be a number greater than 1.")
    if terms.kl_weighted and terms.kl_in == "reward":
        raise ConfigError("loss.kl_weighted=true weighs the KL in the loss, but kl_in is reward.")
    kind = terms.importance_correction
    if kind not in terms.corrections:
        options = ", ".join(terms.corrections)
        raise ConfigError(f"loss.importance_correction={kind} must be one of {options} with {type(terms).__name__}.")
    if low is not None and kind not in ("token_mask", "sequence_mask"):
        raise ConfigError(f"loss.importance_low={low} bounds the masks, and importance_correction is {kind}.")
    if terms.proximal == "actor" and kind != "none":
        raise ConfigError(
            "loss.proximal=actor needs importance_correction=none: its ratio already includes the correction."
        )
    if kind == "none":
        if high is not None:
            raise ConfigError(f"loss.importance_high={high} bounds a correction, and importance_correction is none.")
        return
    bounds = [default if given is None else given for given, default in zip((low, high), BOUNDS[kind], strict=True)]
    if not bounds[0] < bounds[1]:
        raise ConfigError(f"loss.importance_low={bounds[0]} must be less than importance_high={bounds[1]}.")


def _one_of(name: str, value: Any, options: tuple[Any, ...]) -> None:
    if value not in options:
        words = [str(option) for option in options if option is not None]
        raise ConfigError(f"loss.{name}={value} must be one of {', '.join(words)}{nearest(str(value), words)}.")
