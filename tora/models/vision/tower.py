"""Qwen3-VL's vision tower: image patches -> features for the decoder (Qwen3-VL technical report, 2025).

Modules and parameters have Hugging Face's names.
Shape letters: N patches, D values of a patch, W width, F features, H the decoder's hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tora.errors import ConfigError
from tora.models.attention import LayerAttention
from tora.models.decoder import Rope, rotate
from tora.models.vision.layout import VisionLayout

_NORM_EPS = 1e-6


class VisionAttention(nn.Module):
    """Multi-head attention with rotary positions, [N, W] -> [N, W]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_NW: torch.Tensor, rope: Rope, attend: LayerAttention) -> torch.Tensor:
        q, k, v = self.qkv(x_NW).view(1, x_NW.shape[0], 3, self.num_heads, -1).unbind(2)
        out = attend(rotate(q, rope), rotate(k, rope), v)
        return self.proj(out[0].flatten(1))


class VisionMLP(nn.Module):
    """Two linear layers with tanh-approximated GELU, [N, W] -> [N, W]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x_NW: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x_NW), approximate="tanh"))


class VisionBlock(nn.Module):
    """A pre-norm transformer block, [N, W] -> [N, W]."""

    def __init__(self, width: int, inner: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, _NORM_EPS), nn.LayerNorm(width, _NORM_EPS)
        self.attn, self.mlp = VisionAttention(width, num_heads), VisionMLP(width, inner)

    def forward(self, x_NW: torch.Tensor, rope: Rope, attend: LayerAttention) -> torch.Tensor:
        x_NW = x_NW + self.attn(self.norm1(x_NW), rope, attend)
        return x_NW + self.mlp(self.norm2(x_NW))


class PatchEmbedding(nn.Module):
    """[N, D] -> [N, W]. A convolution whose stride equals its kernel, computed as a linear layer."""

    def __init__(self, channels: int, width: int, frames: int, side: int) -> None:
        super().__init__()
        kernel = (frames, side, side)
        self.proj = nn.Conv3d(channels, width, kernel, kernel)

    def forward(self, patches_ND: torch.Tensor) -> torch.Tensor:
        return F.linear(patches_ND.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class Merger(nn.Module):
    """Merges each block of merge x merge patches into one feature. DeepStack's mergers normalise the block, the final
    merger each patch."""

    def __init__(self, width: int, merge: int, out: int, *, norm_of_block: bool) -> None:
        super().__init__()
        self.inner, self.norm_of_block = width * merge**2, norm_of_block
        self.norm = nn.LayerNorm(self.inner if norm_of_block else width, _NORM_EPS)
        self.linear_fc1, self.linear_fc2 = nn.Linear(self.inner, self.inner), nn.Linear(self.inner, out)

    def forward(self, x_NW: torch.Tensor) -> torch.Tensor:
        """[N, W] -> [F, H], with F = N / merge²."""
        x = self.norm(x_NW.view(-1, self.inner)) if self.norm_of_block else self.norm(x_NW).view(-1, self.inner)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionTower(nn.Module):
    """A ViT whose early blocks also feed the decoder's first layers (DeepStack, Meng et al. 2024, arXiv:2406.04334)."""

    def __init__(self, config: Any) -> None:
        """`config`: transformers' config of the vision part. Builds on the default device, weights uninitialised.

        Raises ConfigError if the activation function is not supported.
        """
        super().__init__()
        if config.hidden_act != "gelu_pytorch_tanh":
            raise ConfigError(f"hidden_act {config.hidden_act!r} in config.json's vision_config is not supported")
        width, heads, out = config.hidden_size, config.num_heads, config.out_hidden_size
        self.merge: int = config.spatial_merge_size
        self.patch_numel = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self.side = round(config.num_position_embeddings**0.5)
        self.deepstack_layers = list(config.deepstack_visual_indexes)
        self.head_dim, self.theta = width // heads, (config.rope_parameters or {}).get("rope_theta", 10000.0)
        self.patch_embed = PatchEmbedding(config.in_channels, width, config.temporal_patch_size, config.patch_size)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, width)
        self.blocks = nn.ModuleList(VisionBlock(width, config.intermediate_size, heads) for _ in range(config.depth))
        self.merger = Merger(width, self.merge, out, norm_of_block=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(width, self.merge, out, norm_of_block=True) for _ in self.deepstack_layers
        )

    def _rope(self, coordinate_N2: torch.Tensor) -> Rope:
        """cos and sin, [1, N, head_dim/2]: the first half of the pairs rotates by the row, the second by the column."""
        half = self.head_dim // 2
        exponent = torch.arange(0, half, 2, device=coordinate_N2.device, dtype=torch.float32) / half
        angle = (coordinate_N2[..., None].float() / self.theta**exponent).flatten(1)[None]
        return angle.cos(), angle.sin()

    def forward(self, patches_ND: torch.Tensor, layout: VisionLayout) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The images' features [F, H], in order, and DeepStack's [F, H] to add after decoder layers 0, 1, ..."""
        position_NW = (self.pos_embed(layout.corner_N4) * layout.corner_weight_N4[..., None]).sum(1)
        x_NW = self.patch_embed(patches_ND)
        x_NW = x_NW + position_NW.to(x_NW.dtype)
        rope, deep = self._rope(layout.coordinate_N2), []
        for index, block in enumerate(self.blocks):
            x_NW = block(x_NW, rope, layout.attention)
            if index in self.deepstack_layers:
                deep.append(self.deepstack_merger_list[self.deepstack_layers.index(index)](x_NW))
        return self.merger(x_NW), deep
