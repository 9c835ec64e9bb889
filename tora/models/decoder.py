"""One decoder for all families, on torchtune's modules. All sizes come from config.json.

torchtune's own attention normalises q and k after the rotation. These families do so before, hence `Attention`.

Shapes: b batch, s sequence, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchtune.modules
from torch import nn
from torchtune.modules import (
    FeedForward,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from tora.errors import ConfigError
from tora.models.attention import AttentionContext, LayerAttention
from tora.models.base import Decoder, identity
from tora.models.family import ModelFamily
from tora.models.names import Names
from tora.models.quantize import is_quantized

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of the rotation angles, [b, s, D/2] float32 each."""


class RMSNorm(torchtune.modules.RMSNorm):
    """torchtune's norm for a scale in any dtype. Sharded masters are cast to the compute dtype, but torch's fused
    kernel needs the scale in float32, in which it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> the same shape and dtype."""
        return F.rms_norm(x.float(), self.normalized_shape, self.scale.float(), self.eps).to(x.dtype)


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate x [b, s, heads, D] in float32, and return it in x's dtype. Dimension i is paired with i + D/2, as in
    Hugging Face's models (RoPE, Su et al. 2021, arXiv:2104.09864)."""
    cos, sin = (t.unsqueeze(-2) for t in rope)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class RotaryTable(nn.Module):
    """cos and sin by position. Scaled variants (linear, llama3, yarn) take their frequencies from transformers."""

    inverse_frequency: torch.Tensor

    def __init__(self, config: Any, head_dim: int) -> None:
        super().__init__()
        self.config, self.head_dim = config, head_dim
        self.reset()

    def reset(self) -> None:
        """Compute the frequencies on the default device; call again after building on the meta device."""
        parameters = self.config.rope_parameters
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
            frequency, self.scale = 1.0 / parameters["rope_theta"] ** exponent, 1.0
        else:
            assert kind in ROPE_TYPES, "refused by `native_gap`"
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            frequency, self.scale = ROPE_INIT_FUNCTIONS[kind](self.config, device=None)
        self.register_buffer("inverse_frequency", frequency, persistent=False)

    @torch.no_grad()
    def forward(self, positions: torch.Tensor) -> Rope:
        """positions [b, s] -> cos, sin [b, s, D/2], float32."""
        angle = positions[..., None].float() * self.inverse_frequency
        return angle.cos() * self.scale, angle.sin() * self.scale


class Attention(nn.Module):
    """Grouped-query self-attention: projections, optional q/k norms, rotation, then the attention passed as `mask`."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        q_norm: nn.Module | None,
        k_norm: nn.Module | None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = q_proj, k_proj, v_proj, output_proj
        self.q_norm, self.k_norm = q_norm, k_norm

    def forward(
        self, x: torch.Tensor, _: torch.Tensor | None = None, *, mask: LayerAttention, input_pos: Rope
    ) -> torch.Tensor:
        """x [b, s, hidden] -> [b, s, hidden]. torchtune's layer passes the attention as `mask` and the rotation as
        `input_pos`."""
        b, s, _width = x.shape
        q = self.q_proj(x).view(b, s, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(b, s, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(b, s, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = mask(rotate(q, input_pos), rotate(k, input_pos), v)
        return self.output_proj(out.flatten(2))


class NativeDecoder(Decoder, TransformerDecoder):
    """torchtune's decoder, with positions and attention as arguments of the forward."""

    def __init__(self, *, rope: RotaryTable, names: Names, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rope, self.names = rope, names

    @property
    def head(self) -> torch.Tensor:
        module: Any = self.tok_embeddings if isinstance(self.output, TiedLinear) else self.output
        return module.weight

    @property
    def embedding(self) -> torch.Tensor:
        return self.tok_embeddings.weight

    def stacks(self) -> list[list[nn.Module]]:
        return [list(self.layers)]

    def adaptable(self) -> list[str]:
        return [n for n, m in self.named_modules() if n.startswith("layers.") and isinstance(m, nn.Linear)]

    def quantizable(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if is_quantized(name)}

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor,
        attend: AttentionContext,
        output_fn: Callable[[torch.Tensor], Any] = identity,
        images: None = None,
    ) -> Any:
        return output_fn(self._run(self.tok_embeddings(tokens), positions, attend))

    def _run(
        self,
        h: torch.Tensor,
        positions: torch.Tensor,
        attend: AttentionContext,
        after: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (),
    ) -> torch.Tensor:
        """Embeddings -> hidden states after the final norm, [b, s, hidden]. `after[i]` maps the output of layer i."""
        rope = self.rope(positions)
        for index, layer in enumerate(self.layers):
            h = layer(h, mask=attend.at(index), input_pos=rope)
            if index < len(after):
                h = after[index](h)
        return self.norm(h)


ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def native_gap(config: Any) -> str | None:
    """What this decoder lacks for the architecture that a config describes; None if nothing.

    `config`: transformers' config of a text model.
    """
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "config.json asks for sliding-window attention"
    if config.hidden_act != "silu":
        return f"config.json has hidden_act {config.hidden_act!r}, not silu"
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        return f"config.json has rope_type {rope['rope_type']!r}, not one of {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "config.json rotates a part of each head"
    return None


def build_decoder(config: Any, family: ModelFamily, linear: type[nn.Linear] = nn.Linear) -> NativeDecoder:
    """A decoder on the default device, weights uninitialised.

    `config`: transformers' config of a text model. `linear`: the class of the layers' linear modules, not of the head.
    Raises ConfigError if `native_gap` finds one.
    """
    return NativeDecoder(**decoder_parts(config, family, linear, tied=config.tie_word_embeddings))


def decoder_parts(
    config: Any, family: ModelFamily, linear: type[nn.Linear], *, tied: bool, rope: type[RotaryTable] = RotaryTable
) -> dict[str, Any]:
    """The arguments of `NativeDecoder`, as for `build_decoder`; `tied`: the head shares the embedding's weight."""
    if gap := native_gap(config):
        raise ConfigError(f"model.implementation=native does not support the model: {gap}")
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    eps, mlp, mlp_bias = config.rms_norm_eps, config.intermediate_size, getattr(config, "mlp_bias", False)
    attention_bias = getattr(config, "attention_bias", False)
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    output_bias = attention_bias if family.output_bias is None else family.output_bias

    def layer() -> TransformerSelfAttentionLayer:
        attention = Attention(
            heads, kv_heads, head_dim,
            q_proj=linear(hidden, heads * head_dim, bias=qkv_bias),
            k_proj=linear(hidden, kv_heads * head_dim, bias=qkv_bias),
            v_proj=linear(hidden, kv_heads * head_dim, bias=qkv_bias),
            output_proj=linear(heads * head_dim, hidden, bias=output_bias),
            q_norm=RMSNorm(head_dim, eps) if family.qk_norm else None,
            k_norm=RMSNorm(head_dim, eps) if family.qk_norm else None,
        )  # fmt: skip
        feed_forward = FeedForward(
            gate_proj=linear(hidden, mlp, bias=mlp_bias),
            down_proj=linear(mlp, hidden, bias=mlp_bias),
            up_proj=linear(hidden, mlp, bias=mlp_bias),
        )
        return TransformerSelfAttentionLayer(
            attention,  # pyright: ignore[reportArgumentType]
            feed_forward,
            sa_norm=RMSNorm(hidden, eps),
            mlp_norm=RMSNorm(hidden, eps),
        )

    embedding = nn.Embedding(config.vocab_size, hidden)
    return {
        "rope": rope(config, head_dim),
        "names": family.names,
        "tok_embeddings": embedding,
        "layers": [layer() for _ in range(config.num_hidden_layers)],
        "max_seq_len": config.max_position_embeddings,
        "num_heads": heads,
        "head_dim": head_dim,
        "norm": RMSNorm(hidden, eps),
        "output": TiedLinear(embedding) if tied else nn.Linear(hidden, config.vocab_size, bias=False),
    }
