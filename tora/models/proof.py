"""Whether a model of transformers computes with Tora's attention what it computes with its own.

Run on every such model as it is loaded, so that one that nobody has tested is refused and not trained wrongly.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from tora.errors import ConfigError, described
from tora.models.attention import PackedAttention
from tora.models.generic import GenericDecoder
from tora.models.vision.generic import OwnInputs
from tora.models.vision.inputs import image_inputs
from tora.models.vision.processor import ImageProcessor

_LENGTHS = (23, 9, 40)
_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""Largest mean difference of the first layer's hidden states, relative to their mean size; that of layer i grows with
√i, as rounding does. Measured on twelve tiny models: 4e-7 in float32 and 0.01 in bf16, and 0.12 to 0.8 where documents
see each other."""


@torch.no_grad()
def prove(model: GenericDecoder, device: torch.device, processor: Callable[[], ImageProcessor] | None = None) -> None:
    """Run a few random documents packed with our attention, and one by one with the model's own. Collective.

    `processor`: of a model that takes images, to add a document with one. Raises ConfigError, naming the first layer
    after which the hidden states part.
    """
    vocab_size = model.hf.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, vocab_size, (n,), generator=generator).to(device) for n in _LENGTHS]
    if model.image_token is not None:
        documents = [document.masked_fill(document == model.image_token, 0) for document in documents]
    shown = _shown(processor(), device) if model.image_token is not None and processor is not None else None
    ids = [*documents, *([] if shown is None else [shown.arguments["input_ids"][0]])]
    with _refusing(model), torch.compiler.set_stance("force_eager"):
        with _outputs(model) as packed:
            model(torch.cat(ids)[None], **_packed(model, ids, processor if shown is not None else None, device))
        with _outputs(model) as own, model.own_attention():
            for document in documents:
                model(document[None], positions=torch.arange(len(document), device=device)[None], attend=None)
            if shown is not None:
                model(ids[-1][None], positions=torch.empty(0), attend=None, images=shown)
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
def _refusing(model: GenericDecoder) -> Iterator[None]:
    """Errors of code that expects other inputs than documents become one of the model."""
    try:
        yield
    except ConfigError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"{type(model.hf).__name__} cannot be trained: its forward raised {type(error).__name__} for packed "
            f"documents: {described(error)}"
        ) from error


def _shown(processor: ImageProcessor, device: torch.device) -> OwnInputs:
    """A prompt with an image, as the model's own forward takes it."""
    inputs = processor.model_inputs(f"a {processor.mark} b", [_image()])
    return OwnInputs({name: value.to(device) for name, value in inputs.items()})


def _image() -> bytes:
    """A PNG of noise."""
    from PIL import Image

    noise = torch.randint(0, 256, (60, 44, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).save(file, "PNG")
    return file.getvalue()


def _packed(
    model: GenericDecoder,
    ids: list[torch.Tensor],
    processor: Callable[[], ImageProcessor] | None,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of the forward for the documents in one row, of which the last has an image if there is a
    `processor`."""
    lengths = [len(document) for document in ids]
    places = np.concatenate([np.arange(n) for n in lengths])
    attend, images, positions = PackedAttention(torch.tensor(lengths, device=device)), None, places
    if processor is not None:
        images, positions = image_inputs(
            model,
            processor().pixels([_image()]),
            tokens_T=torch.cat(ids).cpu().numpy(),
            positions_T=places,
            document_T=np.repeat(np.arange(len(ids)), lengths),
            given_T=np.full(len(places), True),
            image_I=np.array([0]),
            device=device,
        )
    where = torch.from_numpy(positions).unsqueeze(-2).to(device)
    return {"positions": where, "attend": attend, "images": images}


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
