"""torch.compile, layer by layer. Layers share their graphs: one each for training's first and other layers, for passes
without gradients, and for passes with the adapters off; lengths are dynamic.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch._dynamo

from tora.models.decoder import Decoder

_RECOMPILE_LIMIT = 32
"""Graphs of one function: the four above, again for one document instead of several, and room for a second model."""


def compile_layers(model: Decoder) -> None:
    """In place, before FSDP2 wraps the layers: its hooks stay outside. A graph break is an error."""
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    for layer in chain(*model.stacks()):
        forward: Any = torch.compile(layer.forward, dynamic=True, fullgraph=True)
        layer.forward = forward
