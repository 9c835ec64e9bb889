"""Qwen3-VL: a vision tower before a Qwen3 decoder. Without images it is that decoder.

Shape letters: F features of all distinct images, M placeholders, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tora.models.attention import AttentionContext
from tora.models.decoder import Decoder, decoder_parts, identity
from tora.models.family import ModelFamily
from tora.models.names import Names
from tora.models.vision.layout import VisionLayout
from tora.models.vision.mrope import MultimodalRotaryTable
from tora.models.vision.tower import VisionTower


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """The images of one forward, on the model's device; `tora.models.vision.inputs` makes them."""

    patches_ND: torch.Tensor
    """All patches of the distinct images, see `Pixels`, in the tower's dtype."""
    layout: VisionLayout
    where_M: torch.Tensor
    """int64: the placeholders' indices into the flattened tokens. None, where images are only for company."""
    feature_M: torch.Tensor
    """int64 in [0, F): the feature of each placeholder."""


class Qwen3VL(Decoder):
    def __init__(self, *, visual: VisionTower, image_token: int, video_token: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.visual, self.image_token, self.video_token = visual, image_token, video_token

    def stacks(self) -> list[list[nn.Module]]:
        return [list(self.visual.blocks), *super().stacks()]

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor,
        attend: AttentionContext,
        finish: Callable[[torch.Tensor], Any] = identity,
        images: ImageInputs | None = None,
    ) -> Any:
        """As `Decoder`'s; with images `positions` are [3, b, s]."""
        h = self.tok_embeddings(tokens)
        if images is None:
            return finish(self._run(h, positions, attend))
        features_FH, deep = self.visual(images.patches_ND, images.layout)
        h = _shown(h, features_FH, images, add=False)
        after = [partial(_shown, features_FH=extra_FH, images=images, add=True) for extra_FH in deep]
        return finish(self._run(h, positions, attend, after))


def _shown(h: torch.Tensor, features_FH: torch.Tensor, images: ImageInputs, *, add: bool) -> torch.Tensor:
    """h [b, s, H] with features in the placeholders' stead, or added to them."""
    flat, features_MH = h.flatten(0, 1), features_FH.index_select(0, images.feature_M).to(h.dtype)
    place = flat.index_add if add else flat.index_copy
    return place(0, images.where_M, features_MH).view_as(h)


def build(config: Any, family: ModelFamily, linear: type[nn.Linear] = nn.Linear) -> Qwen3VL:
    """As `build_decoder`. Whether the head is tied stands in the whole config, not in its text part."""
    return Qwen3VL(
        visual=VisionTower(config.vision_config),
        image_token=config.image_token_id,
        video_token=config.video_token_id,
        **decoder_parts(
            config.text_config, family, linear, tied=config.tie_word_embeddings, rope=MultimodalRotaryTable
        ),
    )


FAMILY = ModelFamily(
    name="qwen3_vl",
    model_type="qwen3_vl",
    qk_norm=True,
    qkv_bias=None,
    output_bias=None,
    names=Names(decoder="model.language_model.", tower="model.visual."),
    build=build,
)
