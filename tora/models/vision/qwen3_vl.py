"""Qwen3-VL: a vision tower in front of a Qwen3 decoder. Without images it equals that decoder.

Shape letters: N patches and F features of all distinct images, D values of a patch, M placeholders, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tora.models.attention import AttentionContext
from tora.models.base import identity
from tora.models.decoder import NativeDecoder, decoder_parts
from tora.models.family import ModelFamily
from tora.models.names import TOWER, Names
from tora.models.vision.layout import VisionLayout, vision_layout
from tora.models.vision.mrope import MultimodalRotaryTable
from tora.models.vision.places import Places
from tora.models.vision.processor import Pixels
from tora.models.vision.tower import VisionTower


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """The images of one forward, on the model's device; see `tora.models.vision.inputs`."""

    patches_ND: torch.Tensor
    """All patches of the distinct images, in the tower's dtype; see `Pixels`."""
    layout: VisionLayout
    index_M: torch.Tensor
    """int64: indices of the placeholders in the flattened tokens; empty for a blank image that is not shown."""
    feature_M: torch.Tensor
    """int64 in [0, F): the feature that replaces each placeholder."""


class Qwen3VL(NativeDecoder):
    """The decoder with its vision tower as `visual`."""

    has_grid_positions = True
    towers = (TOWER.removesuffix("."),)

    def __init__(self, *, visual: VisionTower, image_token: int, video_token: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.visual, self.image_token, self.video_token = visual, image_token, video_token

    def stacks(self) -> list[list[nn.Module]]:
        return [list(self.visual.blocks), *super().stacks()]

    def image_inputs(self, pixels: Pixels, places: Places, device: torch.device) -> ImageInputs:
        tower = self.visual
        layout = vision_layout(
            pixels.grid_IT, merge=tower.merge, side=tower.side, device=device, dtype=self.embedding.dtype
        )
        return ImageInputs(
            patches_ND=pixels.tensors["pixel_values"].to(device, tower.pos_embed.weight.dtype),
            layout=layout,
            index_M=torch.from_numpy(places.index_M).to(device),
            feature_M=torch.from_numpy(places.feature_M).to(device),
        )

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor,
        attend: AttentionContext,
        output_fn: Callable[[torch.Tensor], Any] = identity,
        images: ImageInputs | None = None,
    ) -> Any:
        """Like `Decoder.forward`; with images, `positions` are [3, b, s]."""
        h = self.tok_embeddings(tokens)
        if images is None:
            return output_fn(self._run(h, positions, attend))
        features_FH, deep = self.visual(images.patches_ND, images.layout)
        h = _merge_features(h, features_FH, images, add=False)
        after = [partial(_merge_features, features_FH=extra_FH, images=images, add=True) for extra_FH in deep]
        return output_fn(self._run(h, positions, attend, after))


def _merge_features(h: torch.Tensor, features_FH: torch.Tensor, images: ImageInputs, *, add: bool) -> torch.Tensor:
    """h [b, s, H] with the placeholders' rows replaced by their features, or with `add`, the features added to them."""
    flat, features_MH = h.flatten(0, 1), features_FH.index_select(0, images.feature_M).to(h.dtype)
    merge = flat.index_add if add else flat.index_copy
    return merge(0, images.index_M, features_MH).view_as(h)


def build(config: Any, family: ModelFamily, linear: type[nn.Linear] = nn.Linear) -> Qwen3VL:
    """Like `build_decoder`, for the full config: its `tie_word_embeddings` counts, not that of its text part."""
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
