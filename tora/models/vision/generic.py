"""Any model of transformers that takes images, with our attention in its language model.

Tower, projector and features are the model's own code, run once for each distinct image of a forward.

Shape letters: T packed tokens, M placeholders, F features of all images, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tora.models.attention import AttentionContext
from tora.models.base import identity
from tora.models.generic import GenericDecoder
from tora.models.vision.blocks import BlockAttention, Blocks, blocks_of
from tora.models.vision.places import Places
from tora.models.vision.processor import Pixels

SEES_WHOLE_IMAGES = frozenset({"gemma3"})
"""`model_type` of models in which all features of an image see each other, whatever their order."""


@dataclass(frozen=True, slots=True)
class GenericImages:
    """The images of one forward, on the model's device."""

    pixels: dict[str, torch.Tensor]
    """Arguments of the model's `get_image_features`."""
    index_M: torch.Tensor
    """int64: indices of the placeholders in the flattened tokens."""
    feature_M: torch.Tensor
    """int64 in [0, F): the feature that takes the place of each."""
    blocks: Blocks | None
    """None where features see only what comes before them."""


@dataclass(frozen=True, slots=True)
class OwnInputs:
    """A prompt as the model's own forward takes it."""

    arguments: dict[str, torch.Tensor]


class GenericVision(GenericDecoder):
    """A model of transformers with images, behind the interface of ours."""

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        config, decoder = hf.config, hf.get_decoder()
        self.image_token = config.image_token_id
        self.video_token = getattr(config, "video_token_id", None)
        self.has_grid_positions = "mrope_section" in (config.get_text_config().rope_parameters or {})
        self._sees_whole_images = config.model_type in SEES_WHOLE_IMAGES
        prefix = f"hf.{hf.base_model_prefix}."
        parts = hf.base_model.named_children()
        self.towers = tuple(f"{prefix}{name}" for name, part in parts if part is not decoder)
        self._takes = tuple(inspect.signature(hf.base_model.get_image_features).parameters)

    def stacks(self) -> list[list[nn.Module]]:
        return [*self._tower_layers(), *super().stacks()]

    def compilable(self) -> list[list[nn.Module]]:
        """Without towers, whose code may branch on the sizes of images."""
        return super().stacks()

    def _tower_layers(self) -> list[list[nn.Module]]:
        """The longest list of equal modules of each tower, where it has one."""
        found = []
        for name in self.towers:
            lists = [[*m] for m in self.get_submodule(name).modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
            lists = [each for each in lists if len({type(m) for m in each}) == 1]
            if lists:
                found.append(max(lists, key=len))
        return found

    def image_inputs(self, pixels: Pixels, places: Places, device: torch.device) -> GenericImages:
        dtype = self.embedding.dtype
        tensors = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in pixels.tensors.items()
            if name in self._takes
        }
        index_M, feature_M = (torch.from_numpy(x).to(device) for x in (places.index_M, places.feature_M))
        blocks = blocks_of(places, device) if self._sees_whole_images and len(places.index_M) else None
        return GenericImages(tensors, index_M, feature_M, blocks)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor,
        attend: AttentionContext | None,
        output_fn: Callable[[torch.Tensor], Any] = identity,
        images: GenericImages | OwnInputs | None = None,
    ) -> Any:
        """Like `Decoder.forward`; with images, `positions` are [3, b, s] if it `has_grid_positions`. With `OwnInputs`
        only inside `own_attention`, and the other arguments are left out."""
        if isinstance(images, OwnInputs):
            return output_fn(self.hf.base_model(**images.arguments, use_cache=False).last_hidden_state)
        if images is None:
            return super().forward(tokens, positions=positions, attend=attend, output_fn=output_fn)
        assert attend is not None
        h = self.hf.get_input_embeddings()(tokens)
        seen = self.hf.base_model.get_image_features(**images.pixels, return_dict=True)
        features_FH = torch.cat([each.flatten(0, -2) for each in seen.pooler_output]).to(h.dtype)
        h = h.flatten(0, 1).index_copy(0, images.index_M, features_FH.index_select(0, images.feature_M)).view_as(h)
        more: dict[str, Any] = {}
        if deep := getattr(seen, "deepstack_features", None):  # of Qwen3-VL, to add after the first layers
            placed = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
            placed.view(-1)[images.index_M] = True
            deep_MH = [torch.cat([*each]).index_select(0, images.feature_M) for each in deep]
            more = {"visual_pos_masks": placed, "deepstack_visual_embeds": deep_MH}
        if images.blocks is not None:
            attend = BlockAttention(attend, images.blocks)
        return output_fn(self._decode(positions, attend, inputs_embeds=h, **more))

    @classmethod
    def attention_settings(cls, name: str) -> Any:
        return {"": "sdpa", "text_config": name, "vision_config": "sdpa"}
