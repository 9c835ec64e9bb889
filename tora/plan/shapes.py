"""The sizes of a model that its memory depends on, read from its config.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tora.models.family import families


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, by the last part of its Hugging Face name."""

    name: str
    inputs: int
    outputs: int
    reads: str
    """The tensor it multiplies: layers that read the same one keep it for their gradients only once."""
    bias: bool

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Tower:
    """A Qwen3-VL vision tower."""

    width: int
    inner: int
    heads: int
    depth: int
    merge: int
    """Patches of a side of a feature."""
    patch: int
    """Pixels of a side of a patch."""
    patch_numel: int
    positions: int
    deepstack: int
    """Mergers besides the final one."""
    out: int
    """Width of a feature, the decoder's."""
    prefix: str
    """Hugging Face's prefix of its modules."""

    @property
    def merged(self) -> int:
        return self.width * self.merge**2

    def block(self) -> list[Linear]:
        return [
            Linear("attn.qkv", self.width, 3 * self.width, "attention", True),
            Linear("attn.proj", self.width, self.width, "heads", True),
            Linear("mlp.linear_fc1", self.width, self.inner, "mlp", True),
            Linear("mlp.linear_fc2", self.inner, self.width, "activated", True),
        ]

    def merger(self) -> list[Linear]:
        return [
            Linear("linear_fc1", self.merged, self.merged, "block", True),
            Linear("linear_fc2", self.merged, self.out, "activated", True),
        ]

    @property
    def other_weights(self) -> int:
        """All but the linear layers of blocks and mergers: patch and position embeddings, norms."""
        norms = 2 * (self.depth * 2 * self.width + self.width + self.deepstack * self.merged)
        return self.patch_numel * self.width + self.width + self.positions * self.width + norms

    @property
    def weights(self) -> int:
        linears = self.depth * _weights(self.block()) + (1 + self.deepstack) * _weights(self.merger())
        return linears + self.other_weights


@dataclass(frozen=True, slots=True)
class Shapes:
    """A decoder, with or without a vision tower."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    longest: int
    """Tokens of the longest sequence that the model takes."""
    prefix: str
    """Hugging Face's prefix of the decoder's modules."""
    tower: Tower | None

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    def layer(self, index: int = 0) -> list[Linear]:
        """The linear layers of the decoder layer of this number."""
        return [
            Linear("self_attn.q_proj", self.hidden, self.queries, "attention", self.qkv_bias),
            Linear("self_attn.k_proj", self.hidden, self.keys, "attention", self.qkv_bias),
            Linear("self_attn.v_proj", self.hidden, self.keys, "attention", self.qkv_bias),
            Linear("self_attn.o_proj", self.queries, self.hidden, "heads", self.output_bias),
            Linear("mlp.gate_proj", self.hidden, self.mlp, "mlp", self.mlp_bias),
            Linear("mlp.up_proj", self.hidden, self.mlp, "mlp", self.mlp_bias),
            Linear("mlp.down_proj", self.mlp, self.hidden, "activated", self.mlp_bias),
        ]

    def name(self, layer: int, linear: Linear) -> str:
        """The full Hugging Face name."""
        return f"{self.prefix}layers.{layer}.{linear.name}"

    @property
    def norm_weights(self) -> int:
        """Of the decoder's norms, which are held in float32."""
        per_layer = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.layers * per_layer + self.hidden

    @property
    def layer_weights(self) -> int:
        """Of one decoder layer, without norms."""
        return _weights(self.layer())

    @property
    def quantized_weights(self) -> int:
        """Those that `quantize_base` stores in NF4."""
        return self.layers * sum(linear.weights for linear in self.layer())

    @property
    def table_weights(self) -> int:
        """Of the embedding, and of the head unless it is tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def decoder_weights(self) -> int:
        return self.layers * self.layer_weights + self.table_weights + self.norm_weights

    @property
    def weights(self) -> int:
        return self.decoder_weights + (self.tower.weights if self.tower else 0)

    @property
    def kv_layers(self) -> int:
        """The layers that have keys and values."""
        return self.layers

    @property
    def state_bytes(self) -> int:
        """Of the other layers' state of one sequence, whatever its length."""
        return 0

    def kv_per_sequence(self, tokens: int, itemsize: int, tensor_parallel: int = 1) -> int:
        """Bytes of keys, values and states of a sequence, on each of the devices that share the heads."""
        heads = max(1, self.kv_heads // tensor_parallel)
        per_token = 2 * self.kv_layers * heads * self.head_dim * itemsize
        return tokens * per_token + self.state_bytes // tensor_parallel


def read_shapes(config: Any) -> Shapes:
    """`config`: transformers' config object of a supported family."""
    family = families()[config.model_type]
    text = config.get_text_config()
    vision = getattr(config, "vision_config", None)
    bias = bool(getattr(text, "attention_bias", False))
    return Shapes(
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qk_norm=family.qk_norm,
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias if family.output_bias is None else family.output_bias,
        mlp_bias=bool(getattr(text, "mlp_bias", False)),
        longest=text.max_position_embeddings,
        prefix=family.names.decoder,
        tower=None if vision is None else _tower(vision, family.names.tower or ""),
    )


def _tower(vision: Any, prefix: str) -> Tower:
    return Tower(
        width=vision.hidden_size,
        inner=vision.intermediate_size,
        heads=vision.num_heads,
        depth=vision.depth,
        merge=vision.spatial_merge_size,
        patch=vision.patch_size,
        patch_numel=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        positions=vision.num_position_embeddings,
        deepstack=len(vision.deepstack_visual_indexes),
        out=vision.out_hidden_size,
        prefix=prefix,
    )


def _weights(linears: list[Linear]) -> int:
    return sum(linear.weights + (linear.outputs if linear.bias else 0) for linear in linears)


def tower_linears(tower: Tower) -> Iterator[tuple[str, Linear]]:
    """All linear layers of the tower with their full Hugging Face names, in the tower's order."""
    for block in range(tower.depth):
        yield from ((f"{tower.prefix}blocks.{block}.{linear.name}", linear) for linear in tower.block())
    for place in ["merger", *(f"deepstack_merger_list.{i}" for i in range(tower.deepstack))]:
        yield from ((f"{tower.prefix}{place}.{linear.name}", linear) for linear in tower.merger())
