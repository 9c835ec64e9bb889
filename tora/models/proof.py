"""Whether a model of transformers computes with Tora's attention what it computes with its own.

Run on every such model as it is loaded, so that one that nobody has tested is refused and not trained wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from tora.errors import ConfigError
from tora.models.attention import PackedAttention
from tora.models.generic import GenericDecoder

_LENGTHS = (23, 9, 40)
_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""Largest mean difference of the first layer's hidden states, relative to their mean size; that of layer i grows with
√i, as rounding does. Measured on twelve tiny models: 4e-7 in float32 and 0.01 in bf16, and 0.12 to 0.8 where documents
see each other."""


@torch.no_grad()
def prove(model: GenericDecoder, device: torch.device) -> None:
    """Run a few random documents packed with our attention, and one by one with the model's own. Collective.

    Raises ConfigError, naming the first layer after which the hidden states part.
    """
    vocab_size = model.hf.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, vocab_size, (n,), generator=generator).to(device) for n in _LENGTHS]
    places = [torch.arange(len(document), device=device) for document in documents]
    with torch.compiler.set_stance("force_eager"):
        with _outputs(model) as packed:
            attend = PackedAttention(torch.tensor(_LENGTHS, device=device))
            model(torch.cat(documents)[None], positions=torch.cat(places)[None], attend=attend)
        with _outputs(model) as own, model.own_attention():
            for document, place in zip(documents, places, strict=True):
                model(document[None], positions=place[None], attend=None)
    names = {module: model.names.module_to_hf(name) for name, module in model.named_modules()}
    for index, layer in enumerate(chain(*model.stacks())):
        ours, theirs = packed[layer][0].float(), torch.cat(own[layer], 1).float()
        gap = float((ours - theirs).abs().mean() / theirs.abs().mean())
        # of the dtype that the layer computes in, not of its weights: full weights are held in float32
        bound = _BOUND.get(packed[layer][0].dtype, max(_BOUND.values())) * math.sqrt(index + 1)
        if not gap <= bound:
            raise ConfigError(
                f"{type(model.hf).__name__} cannot be trained: with Tora's attention its hidden states part from its "
                f"own after {names[layer]}, by {gap:.1e} of their size, and {bound:.0e} is allowed"
            )


@contextmanager
def _outputs(model: GenericDecoder) -> Iterator[dict[nn.Module, list[torch.Tensor]]]:
    """The outputs of each layer, in order of the forward passes within the context."""
    seen: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in chain(*model.stacks())}

    def keep(layer: nn.Module, _: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen[layer].append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in seen]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
