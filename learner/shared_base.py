"""A learner whose frozen weights are those that an engine in the same process serves, instead of a second copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from tora.models.base import Decoder

Weights = Mapping[str, torch.Tensor]
"""An engine's weights by Hugging Face name."""


class SharedBase:
    """Replaces the frozen parameters of a model, unit by unit as they are loaded, by an engine's.

    Only those that are equal to the bit, in the same dtype and on the same device, are replaced, so the model computes
    what it would with its own.
    """

    def __init__(self, weights: Callable[[list[str]], Weights]) -> None:
        """`weights` is given Hugging Face names, and returns those tensors that the engine has."""
        self._weights = weights
        self.nbytes = 0
        """Bytes that are held once."""

    def sharer(self, model: Decoder) -> Callable[[nn.Module], None]:
        """A function to be called with each layer of `model` once its weights are loaded, and at last with `model`."""
        prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
        replaced: set[str] = set()

        def share(unit: nn.Module) -> None:
            names = {
                model.names.parameter_to_hf(full): full
                for name, parameter in unit.named_parameters()
                if (full := prefixes[unit] + name) not in replaced and _is_base(full, parameter)
            }
            for hf_name, view in self._weights(list(names)).items():
                name = names[hf_name]
                own = model.get_parameter(name)
                if own.dtype == view.dtype and own.device == view.device and torch.equal(own, view):
                    parent, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(parent), leaf, nn.Parameter(view, requires_grad=False))
                    replaced.add(name)
                    self.nbytes += view.nbytes

        return share


def _is_base(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is of the base, frozen and loaded."""
    return not parameter.requires_grad and not parameter.is_meta and name.rpartition(".")[2] in ("weight", "bias")
