"""The sizes of a model that transformers' code runs, read from the model itself on the meta device.

What its layers keep for the backward pass is what autograd saves there: operations run on shapes alone, with attention
taken to be fused. Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from tora.adapters.inject import inject
from tora.adapters.peft_config import PeftConfig
from tora.adapters.targets import adapter_shapes
from tora.config.schema import RunConfig
from tora.models.attention import PLAIN, LayerAttention, Scores
from tora.models.generic import GenericDecoder
from tora.models.generic_build import build_generic, cast_parameters
from tora.models.recurrence import Continuing, Recurrence, Unpadded
from tora.plan.activations import LayerBytes
from tora.plan.shapes import Linear, Shapes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_COPIES_OF_CAPPED = 3
"""Matrices of all scores that soft-capped attention keeps: before the cap, after it, and the probabilities."""


@dataclass(frozen=True, slots=True)
class TransformersShapes(Shapes):
    """`Shapes` whose sums are counted in the model."""

    config: Any
    linears: tuple[tuple[Linear, ...], ...]
    """Of each decoder layer, those that may carry an adapter."""
    recurrent: frozenset[int]
    """The layers that carry a state in place of keys and values."""
    counted_state: int
    counted_layer: int
    counted_quantized: int
    counted_weights: int
    known: dict[tuple[str, ...], LayerBytes] = field(default_factory=dict, compare=False, repr=False)
    """Of a token, by what it depends on: advice asks for many numbers of them."""

    def layer(self, index: int = 0) -> list[Linear]:
        return [*self.linears[index]]

    @property
    def kv_layers(self) -> int:
        return self.layers - len(self.recurrent)

    @property
    def state_bytes(self) -> int:
        return self.counted_state

    @property
    def norm_weights(self) -> int:
        """None apart: transformers holds norms in the model's dtype."""
        return 0

    @property
    def layer_weights(self) -> int:
        return self.counted_layer

    @property
    def quantized_weights(self) -> int:
        return self.counted_quantized

    @property
    def decoder_weights(self) -> int:
        """With a tower that is not trained."""
        return self.counted_weights

    @property
    def weights(self) -> int:
        return self.counted_weights


def read_transformers_shapes(config: Any) -> TransformersShapes:
    """`config`: transformers' config object. Raises ConfigError if the generic path cannot run the model."""
    model = build_generic(config)
    text = config.get_text_config()
    layers = model.stacks()[-1]
    names = {module: name for name, module in model.named_modules()}
    prefixes = [f"{names[layer]}." for layer in layers]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    modules = [(name, model.get_submodule(name)) for name in model.adaptable()]
    linears = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    inside = [
        tuple(
            Linear(name.removeprefix(prefix), m.in_features, m.out_features, name, m.bias is not None)
            for name, m in linears
            if name.startswith(prefix)
        )
        for prefix in prefixes
    ]
    return TransformersShapes(
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        layers=len(layers),
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        vocab=text.vocab_size,
        tied=model.is_tied,
        qk_norm=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        longest=text.max_position_embeddings,
        prefix=model.names.module_to_hf(prefixes[0]).removesuffix("layers.0."),
        tower=None,
        config=config,
        linears=tuple(inside),
        recurrent=frozenset(model.recurrent),
        counted_state=_state_bytes(model) if model.recurrent else 0,
        counted_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        counted_quantized=sum(m.weight.numel() for _, m in linears),
        counted_weights=sum(p.numel() for p in model.parameters()),
    )


def layer_bytes(
    cfg: RunConfig, shapes: TransformersShapes, start: PeftConfig | None, *, tokens: int, longest: int, on_gpu: bool
) -> LayerBytes:
    """For `tokens` in sequences of `longest`, with which it grows."""
    key = (repr(cfg.model), cfg.dtype, str(longest), str(on_gpu), repr(start))
    if key not in shapes.known:
        shapes.known[key] = _of_one_sequence(cfg, shapes.config, start, longest, on_gpu=on_gpu)
    one = shapes.known[key]
    return LayerBytes(tuple(own * tokens // longest for own in one.layers))


def _of_one_sequence(
    cfg: RunConfig, config: Any, start: PeftConfig | None, longest: int, *, on_gpu: bool
) -> LayerBytes:
    # in float32 a GPU has no fused kernel for grouped heads
    attend = _Attend(longest, fused=not (on_gpu and cfg.dtype == "fp32"))
    try:
        return _layer_bytes(cfg, config, start, _DTYPES[cfg.dtype], attend, longest)
    except (RuntimeError, NotImplementedError):
        # experts in float32 run one by one, with shapes that depend on values; in bf16 they are one product
        half = _layer_bytes(cfg, config, start, torch.bfloat16, attend, longest)
        return LayerBytes(tuple(2 * own for own in half.layers))


def _layer_bytes(
    cfg: RunConfig, config: Any, start: PeftConfig | None, dtype: torch.dtype, attend: _Attend, tokens: int
) -> LayerBytes:
    model = build_generic(config)
    cast_parameters(model, dtype)
    for module in model.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            setattr(module, "rope_type", "default")  # noqa: B010  (others read the positions)
    model.requires_grad_(cfg.model.lora_type == "full")
    if cfg.model.lora_type != "full":
        inject(model, cfg.model.lora_type, adapter_shapes(model, cfg.model, start), dropout=cfg.model.lora_dropout)
    kinds = [index in model.recurrent for index in range(len(model.stacks()[-1]))]
    saved = cache(lambda count: _saved(model, count, tokens, attend))
    # later layers of a kind all keep the same
    places = {kind: index for index, kind in reversed([*enumerate(kinds)]) if index}
    later = {kind: max(0, saved(index + 1) - saved(index)) for kind, index in places.items()}
    return LayerBytes((saved(1), *(later[kind] for kind in kinds[1:])))


def _state_bytes(model: GenericDecoder) -> int:
    """Of all layers' states of one sequence, in the dtype of the model's parameters."""
    keeping = _Keeping()
    ids = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    with torch.no_grad():
        model(ids, positions=ids, attend=keeping)
    return sum(x.numel() * x.itemsize for state in keeping.states for x in state.tensors())


def _saved(model: GenericDecoder, layers: int, tokens: int, attend: _Attend) -> int:
    """Bytes of the distinct tensors that autograd keeps of a forward pass through the first `layers` layers."""
    held = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with _first_layers(model, layers), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(ids, positions=ids, attend=attend)
    del out
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def _first_layers(model: GenericDecoder, count: int) -> Iterator[None]:
    decoder = model.hf.get_decoder()
    layers, number = decoder.layers, decoder.config.num_hidden_layers
    decoder.layers, decoder.config.num_hidden_layers = layers[:count], min(count, number)
    try:
        yield
    finally:
        decoder.layers, decoder.config.num_hidden_layers = layers, number


class _Attend:
    """Attention by shapes alone."""

    def __init__(self, longest: int, *, fused: bool) -> None:
        self._longest, self._fused = longest, fused

    def at(self, layer: int) -> LayerAttention:
        return self

    def recurrent_at(self, layer: int) -> Recurrence:
        return Unpadded()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        rows = 1
        if scores.cap is not None:
            rows = _COPIES_OF_CAPPED * self._longest
        elif not self._fused and q.shape[2] != k.shape[2]:
            rows = self._longest
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        return _Attention.apply(q, k, v, rows)  # pyright: ignore[reportReturnType]


class _Keeping(_Attend):
    """The same, and layers' states are kept."""

    def __init__(self) -> None:
        super().__init__(1, fused=True)
        self.states: list[Continuing] = []

    def recurrent_at(self, layer: int) -> Recurrence:
        self.states.append(Continuing.from_nothing())
        return self.states[-1]


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, output and `rows` float32 numbers for each query and head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int) -> torch.Tensor:
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
        numbers = torch.empty((*q.shape[:3], rows), dtype=torch.float32, device=q.device)
        ctx.save_for_backward(*(x.contiguous() for x in (q, k, v)), out, numbers)
        return out

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError("only the forward pass runs")
