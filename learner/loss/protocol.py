"""The contract between the learner and a loss."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, Protocol

import torch

from learner.loss.inputs import LossInputs
from learner.loss.kl import KLPlace, KLType
from tora.config.calls import call
from tora.config.components import is_own, make
from tora.config.schema import Component
from tora.errors import ComponentError, ConfigError

Proximal = Literal["learner", "actor"]
ReferenceKind = Literal["initial", "base"]
LossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""The loss of one micro-batch, a scalar that carries the gradient, and detached scalar metrics by name."""


class Loss(Protocol):
    """An objective on flat response tokens, as a callable with five attributes that the learner reads.

    Both outputs must be additive over micro-batches: the learner calls the loss once per micro-batch and rank, calls
    `backward` on each result, and sums losses, gradients and metrics over all of them. So a loss sums over tokens,
    with `x.weights_N` for the loss and `x.shares_N` for metrics that are means, and never divides by the number of
    tokens or sequences of its micro-batch. A micro-batch holds whole sequences, but perhaps only part of a group.
    With `step_parts` they must also grow in proportion to `x.weights_N` and `x.shares_N`, as such sums do.

    `learner.loss.objective.Terms` supplies the attributes, their validation and the terms that all losses share.

    Example:
        @dataclass(frozen=True)
        class ReinforceLoss(Terms):
            def __call__(self, x: LossInputs) -> LossOutput:
                objective_N = x.advantages_N * x.learner_logprobs_N
                return total(self, x, objective_N, torch.zeros_like(objective_N, dtype=torch.bool))
    """

    @property
    def kl_coeff(self) -> float:
        """β, at least 0. If it is 0 the learner computes no reference log-probs and `x.ref_logprobs_N` is None."""
        ...

    @property
    def kl_type(self) -> KLType | None:
        """The KL estimator; None selects the default for `kl_in`, see `learner.loss.kl.kind_of`. With
        `kl_in="reward"` the learner itself applies it."""
        ...

    @property
    def kl_in(self) -> KLPlace:
        """`loss`: the loss adds the KL term. `reward`: the learner subtracts β Σ_t KL_t from each sequence's reward and
        recomputes the advantages; the loss must not add it again."""
        ...

    @property
    def reference(self) -> ReferenceKind:
        """The policy behind `x.ref_logprobs_N`: the policy as training began (`initial`), or the base model without an
        adapter (`base`)."""
        ...

    @property
    def proximal(self) -> Proximal:
        """The policy whose log-probs the learner passes as `x.proximal_logprobs_N`: its own at the start of the step
        (`learner`), or those of the engine that sampled the tokens (`actor`)."""
        ...

    def __call__(self, x: LossInputs) -> LossOutput:
        """The loss and metrics of one micro-batch, each additive over micro-batches."""
        ...


def loss_of(component: Component, loss: Loss, x: LossInputs) -> LossOutput:
    """What the component's loss says of a micro-batch; the metrics are a new dict.

    Raises ComponentError if it raises, or returns something else than `Loss` says.
    """
    output = call(component, "loss", loss, x)
    if is_own(component):
        return output
    match output:
        case (torch.Tensor() as value, Mapping() as metrics) if value.ndim == 0 and value.requires_grad:
            if all(isinstance(m, Real) or (isinstance(m, torch.Tensor) and m.ndim == 0) for m in metrics.values()):
                return value, {name: torch.as_tensor(metric).detach() for name, metric in metrics.items()}
    raise ComponentError(
        f"loss: {component['_component_']} returned {_shown(output)}, expected a tensor of one number that carries a "
        "gradient, and a dict of numbers"
    )


def _shown(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        grad = "" if output.requires_grad else " without a gradient"
        return f"a tensor of shape {list(output.shape)}{grad}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {', '.join(map(_shown, output)) or 'nothing'}"
    return "None" if output is None else f"a {type(output).__name__}"


_MEMBERS = ("kl_coeff", "kl_type", "kl_in", "reference", "proximal", "__call__")


def build_loss(component: Component) -> Loss:
    """The config's loss. Raises ConfigError if it cannot be built or lacks a member of `Loss`."""
    loss = make(component, "loss")
    if missing := [name for name in _MEMBERS if not hasattr(loss, name)]:
        raise ConfigError(
            f"loss._component_={component['_component_']} lacks {', '.join(missing)}; "
            "learner.loss.protocol.Loss documents what a loss needs."
        )
    return loss
