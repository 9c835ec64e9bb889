"""Less memory for activations: make them again in the backward pass, or let them wait in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torchtune.training import OffloadActivations

from tora.config.schema import ActivationCheckpointing
from tora.errors import ConfigError
from tora.models.decoder import Decoder

_EVERY = {"full": 1, "selective": 2}


def checkpoint_layers(model: Decoder, kind: ActivationCheckpointing, *, offload: bool, device: torch.device) -> None:
    """In place, after `compile_layers` and before FSDP2 wraps the layers: a layer that is computed again runs its
    compiled graph, inside FSDP2's hooks, which have gathered its weights by then.

    Of a layer that is checkpointed only the input is kept; `selective` takes every other layer, from the first on.
    `offload` keeps those inputs in pinned memory and copies them back ahead of their use.
    Errors: ConfigError where `offload` finds no GPU.
    """
    if offload and device.type != "cuda":
        raise ConfigError("activation_offloading=true moves activations off a GPU, and the learner runs on a CPU.")
    if kind == "none":
        return
    away = OffloadActivations() if offload else nullcontext()
    for stack in model.stacks():
        for layer in stack[:: _EVERY[kind]]:
            layer.forward = _checkpointed(layer.forward, away)


def _checkpointed(forward: Callable[..., torch.Tensor], away: AbstractContextManager[Any]) -> Callable[..., Any]:
    def again_in_backward(*args: Any, **kwargs: Any) -> Any:
        with away:
            # no layer draws random numbers, so there is no state of a generator to restore
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again_in_backward
