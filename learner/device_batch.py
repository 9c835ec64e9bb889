"""A micro-batch on the learner's device, with its model's inputs: tokens, positions, images.

Shape letters: P shared prompts, B sequences, T packed tokens, N response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from tora.batching.packing import documents
from tora.models.base import Decoder
from tora.models.shared_prefix import training_attention
from tora.models.vision.inputs import ImageReader
from tora.models.vision.processor import ImageProcessor
from tora.types import MicroBatch


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Fields of `MicroBatch`, by the same names, as tensors on the device."""

    tokens_T: torch.Tensor
    prompt_lengths_P: torch.Tensor
    lengths_B: torch.Tensor
    prompt_B: torch.Tensor
    response_N: torch.Tensor
    targets_N: torch.Tensor
    sequence_N: torch.Tensor
    actor_logprobs_N: torch.Tensor
    versions_N: torch.Tensor
    advantages_N: torch.Tensor
    weights_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class Inputs(_Arrays):
    """One micro-batch in the form that the model and the loss take."""

    positions: torch.Tensor
    """int64 [1, T], or with images [3, 1, T] where they have time, row and column."""
    images: Any
    """None if the micro-batch has no images and no other rank has any."""


class InputBuilder:
    """Moves micro-batches to the device and turns each of their distinct images into pixels once."""

    def __init__(self, model: Decoder, processor: Callable[[], ImageProcessor], device: torch.device) -> None:
        self._model, self._device = model, device
        self._read_images = ImageReader(model, processor, device)

    def __call__(self, batch: MicroBatch, *, other_ranks_have_images: bool) -> Inputs:
        """With `other_ranks_have_images`, a micro-batch without images gets a blank one: the vision tower's weights
        are sharded, so every rank must run it. Raises ValueError as `ImageReader` does."""
        arrays: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(_Arrays)}
        positions, images = batch.positions_T, None
        if batch.images:
            document_T, branch_T = documents(batch)
            images, positions = self._read_images(
                batch.images,
                tokens_T=batch.tokens_T,
                positions_T=batch.positions_T,
                document_T=document_T,
                given_T=batch.given_T,
                image_I=batch.image_I,
                branch_T=branch_T,
            )
        elif other_ranks_have_images:
            images = self._read_images.blank()
        on_device = {name: torch.tensor(array, device=self._device) for name, array in arrays.items()}
        return Inputs(**on_device, positions=torch.tensor(positions, device=self._device).unsqueeze(-2), images=images)


def forward(model: Decoder, x: Inputs, output_fn: Callable[[torch.Tensor], Any]) -> Any:
    """`output_fn` applied to the final hidden states, [1, T, hidden]."""
    attend = training_attention(x.prompt_lengths_P, x.lengths_B, x.prompt_B, model.embedding.dtype)
    return model(x.tokens_T[None], positions=x.positions, attend=attend, output_fn=output_fn, images=x.images)
