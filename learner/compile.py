"""torch.compile, layer by layer. Equal layers share graphs: one for the first layer in training and one for the others,
one for passes without gradients and one for passes with adapters off. Lengths are dynamic.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch._dynamo

from tora.models.base import Decoder

_RECOMPILE_LIMIT = 32
"""Graphs of one function: the four above, each for one document and for several, and room for a second model."""


def compile_layers(model: Decoder) -> None:
    """Compile layers in place; a graph break is an error. Call before FSDP2 wraps the layers, so that its hooks stay
    outside the graphs."""
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    for layer in chain(*model.compilable()):
        forward: Any = torch.compile(layer.forward, dynamic=True, fullgraph=True)
        layer.forward = forward
