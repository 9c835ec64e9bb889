"""Activation memory: recompute activations in the backward pass, or offload them to CPU memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torchtune.training import OffloadActivations

from tora.config.schema import ActivationCheckpointing
from tora.errors import ConfigError
from tora.models.base import Decoder

_STRIDE = {"full": 1, "selective": 2}


def checkpoint_layers(
    model: Decoder, kind: ActivationCheckpointing, *, offload: bool, device: torch.device, draws: bool = False
) -> None:
    """Checkpoint layers in place: of a checkpointed layer only the input is stored. `selective` checkpoints every other
    layer, starting with the first. `offload` stores those inputs in pinned CPU memory and prefetches them.

    `draws`: layers draw random numbers, which recomputation must draw again.

    Call after `compile_layers` and before FSDP2 wraps the layers: recomputation then runs the compiled graph, inside
    FSDP2's hooks, which have gathered the weights by then.

    Raises ConfigError if `offload` is set without a GPU.
    """
    if offload and device.type != "cuda":
        raise ConfigError("activation_offloading=true moves activations off a GPU, but the learner runs on a CPU.")
    if kind == "none":
        return
    offload_context = OffloadActivations() if offload else nullcontext()
    for stack in model.stacks():
        for layer in stack[:: _STRIDE[kind]]:
            layer.forward = _checkpointed(layer.forward, offload_context, draws)


def _checkpointed(
    forward: Callable[..., torch.Tensor], offload_context: AbstractContextManager[Any], draws: bool
) -> Callable[..., Any]:
    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        with offload_context:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)

    return checkpointed_forward
