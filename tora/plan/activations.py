"""Bytes that one micro-batch keeps between its forward and its backward pass, from shapes.

They are what autograd saves, layer by layer, and equal its count on a CPU (`tests/unit/test_plan_activations.py`). A
layer that neither trains anything nor passes a gradient on keeps nothing. torch.compile recomputes cheap operations and
keeps less.

Shape letters: T tokens, N response tokens, P image patches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tora.plan.shapes import Linear, Tower
from tora.plan.training import Adapter, Training

Parts = Counter[str]
"""Bytes by type of layer."""
_FLOAT = 4
CHUNK_BYTES = 1 << 27
"""`learner.logprobs.CHUNK_BYTES`."""


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What autograd keeps of one micro-batch, counted on a model whose layers are not known."""

    layers: tuple[int, ...]
    """Of each layer; the first one's with the final norm and what all layers share."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The size of one micro-batch on one device. Sequences are taken to be of equal length: on a CPU, attention pads
    them to the longest."""

    tokens: int
    responses: int
    patches: int
    """Of its distinct images."""
    longest: int
    """Tokens of a sequence."""
    on_gpu: bool
    checkpointing: str = "none"
    """`activation_checkpointing`."""
    offloading: bool = False
    counted: LayerBytes | None = None
    """None for Tora's own decoder, whose layers keep what their shapes say."""


@dataclass(frozen=True, slots=True)
class Activations:
    saved: Parts
    """What is kept at the end of the forward pass."""
    passing: int
    """The most that computing the log-probs, or one layer's backward pass, adds to that."""

    @property
    def peak(self) -> int:
        return self.saved.total() + self.passing


def activations(training: Training, batch: MicroBatch) -> Activations:
    """The most memory of one forward and backward pass, besides weights, gradients and optimizer state."""
    if batch.counted is not None:
        return _counted(training, batch, batch.counted)
    shapes, size = training.shapes, training.itemsize
    tower = shapes.tower if batch.patches else None
    passes_on = training.full or (tower is not None and training.vision != "none")
    width = batch.tokens * shapes.hidden * size
    saved, recomputed = Counter[str](), 0
    if tower is not None:
        tower_saved, recomputed = _tower(training, tower, batch)
        saved += tower_saved
    known: dict[object, Parts] = {}  # most layers are alike
    for index in range(shapes.layers):
        adapters = training.layers[index]
        if not (adapters or passes_on):
            continue
        kind = (passes_on, *((name, adapter.rank) for name, adapter in adapters.items()))
        if kind not in known:
            known[kind] = _layer(training, adapters, batch, passes_on=passes_on)
        layer = known[kind]
        if is_checkpointed(batch.checkpointing, index):
            saved["layer inputs"] += 0 if batch.offloading else width
            recomputed = max(recomputed, layer.total())
        else:
            saved += layer
        passes_on = True
    if batch.offloading and recomputed:
        saved["layer inputs"] += 2 * width  # one in use and one on its way
    if passes_on:
        saved["norms"] += _norm(training, batch, batch.tokens, shapes.hidden)
        saved["log-probs"] += batch.responses * (shapes.hidden * size + 2 * _FLOAT)
        saved["attention"] += batch.tokens * shapes.head_dim * _FLOAT  # cos and sin, which all layers share
    return Activations(saved, max(_head(training, batch), recomputed + _backward(training, batch)))


def _counted(training: Training, batch: MicroBatch, counted: LayerBytes) -> Activations:
    width = batch.tokens * training.shapes.hidden * training.itemsize
    saved, recomputed = Counter[str](), 0
    for index, own in enumerate(counted.layers):
        if is_checkpointed(batch.checkpointing, index):
            saved["layer inputs"] += 0 if batch.offloading else width
            recomputed = max(recomputed, own)
        else:
            saved["layers"] += own
    if batch.offloading and recomputed:
        saved["layer inputs"] += 2 * width
    saved["log-probs"] += batch.responses * (training.shapes.hidden * training.itemsize + 2 * _FLOAT)
    return Activations(saved, max(_head(training, batch), recomputed + _backward(training, batch)))


def is_checkpointed(kind: str, index: int) -> bool:
    """Whether `learner.activation` checkpoints the layer of this number in its stack."""
    return kind == "full" or (kind == "selective" and index % 2 == 0)


def _layer(training: Training, adapters: Mapping[str, Adapter], batch: MicroBatch, *, passes_on: bool) -> Parts:
    """`passes_on`: whether the layer's input needs a gradient."""
    shapes, size, tokens = training.shapes, training.itemsize, batch.tokens
    parts = Counter[str]()

    def has(*names: str) -> bool:
        return any(name in adapters for name in names)

    parts += _linears(training, shapes.layer(), adapters, tokens, batch, passes_on=passes_on)
    in_attention = passes_on or has("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    to_mlp = in_attention or has("self_attn.o_proj")
    parts["norms"] += _norm(training, batch, tokens, shapes.hidden) * (passes_on + to_mlp)
    if in_attention:
        if shapes.qk_norm:
            normed = {"self_attn.q_proj": shapes.heads, "self_attn.k_proj": shapes.kv_heads}
            heads = sum(count for name, count in normed.items() if passes_on or has(name))
            parts["norms"] += _norm(training, batch, tokens * heads, shapes.head_dim)
        parts["attention"] += _attention(shapes.queries, shapes.keys, shapes.heads, size, batch)
    if to_mlp or has("mlp.gate_proj", "mlp.up_proj"):
        parts["mlp"] += 3 * tokens * shapes.mlp * size  # the gate before and after its activation, and its factor
    return parts


def _norm(training: Training, batch: MicroBatch, rows: int, width: int) -> int:
    """An RMS norm's input in float32 and one factor a row. On a CPU the gradient of a trained scale needs the scaled
    input too, which a GPU's fused kernel computes again."""
    copies = 2 if training.full and not batch.on_gpu else 1
    return rows * (copies * width + 1) * _FLOAT


def _linears(
    training: Training,
    linears: list[Linear],
    adapters: Mapping[str, Adapter],
    rows: int,
    batch: MicroBatch,
    *,
    passes_on: bool,
) -> Parts:
    """What the linear layers of one block keep of their inputs, and adapters of their products. `passes_on`: whether
    the block's input needs a gradient."""
    parts, size = Counter[str](), training.itemsize
    kept: dict[str, int] = {}
    for linear in linears:
        adapter = adapters.get(linear.name)
        if training.full and adapter is None:
            kept[linear.reads] = linear.inputs
        if adapter is None:
            continue
        parts["adapters"] += rows * adapter.rank * size
        if size < _FLOAT:  # A and B, cast
            parts["adapters"] += adapter.rank * (linear.inputs + linear.outputs) * size
        if training.dropout:
            mask = (1 if batch.on_gpu else size) if passes_on or linear.reads != "attention" else 0
            parts["adapters"] += rows * linear.inputs * (size + mask)
        else:
            kept[linear.reads] = linear.inputs
        if adapter.dora:  # the gain's gradient needs what it multiplies
            parts["adapters"] += rows * linear.outputs * (2 * _FLOAT if training.dropout else size)
    for reads, inputs in kept.items():
        if reads == "heads" and batch.on_gpu and size < _FLOAT:
            continue  # flash attention's own output, which it keeps
        parts["mlp" if reads in ("mlp", "activated") else "attention"] += rows * inputs * size
    return parts


def _attention(queries: int, keys: int, heads: int, size: int, batch: MicroBatch) -> int:
    """Queries, keys, values, output and the softmax's normalisers. In float32 a GPU has no fused kernel for grouped
    heads, and keeps the probabilities and repeated keys and values as well."""
    fused = batch.tokens * (2 * queries * size + 2 * keys * size + heads * _FLOAT)
    if batch.on_gpu and size == _FLOAT and queries != keys:
        return batch.tokens * (4 * queries + heads * batch.longest) * _FLOAT
    return fused


def _tower(training: Training, tower: Tower, batch: MicroBatch) -> tuple[Parts, int]:
    """What a trained tower keeps, and what the largest checkpointed block keeps when it is recomputed. A frozen one
    keeps nothing."""
    if training.vision == "none":
        return Counter(), 0
    size, rows = training.itemsize, batch.patches
    parts, recomputed = Counter[str](), 0
    full = training.vision == "full"
    for index in range(tower.depth):
        passes_on = full or index > 0
        own = _tower_linears(
            training, tower.block(), rows, f"{tower.prefix}blocks.{index}.", batch, passes_on=passes_on
        )
        own += rows * ((2 if passes_on else 1) * (tower.width * size + 2 * _FLOAT))  # layer norms
        own += rows * (4 * tower.width * size + tower.heads * _FLOAT)  # queries, keys, values, output
        own += rows * tower.inner * size  # what GELU reads
        if is_checkpointed(batch.checkpointing, index):
            parts["vision tower"] += 0 if batch.offloading else rows * tower.width * size
            recomputed = max(recomputed, own)
        else:
            parts["vision tower"] += own
    features = rows // tower.merge**2
    for place in ["merger", *(f"deepstack_merger_list.{i}" for i in range(tower.deepstack))]:
        own = _tower_linears(training, tower.merger(), features, f"{tower.prefix}{place}.", batch, passes_on=True)
        own += rows * tower.width * size + features * tower.merged * size  # the norm's input, and what GELU reads
        parts["vision tower"] += own
    return parts, recomputed


def _tower_linears(
    training: Training, linears: list[Linear], rows: int, prefix: str, batch: MicroBatch, *, passes_on: bool
) -> int:
    if training.vision == "full":
        return sum(rows * linear.inputs * training.itemsize for linear in linears)
    by_name = dict(training.tower)
    adapters = {linear.name: by_name[f"{prefix}{linear.name}"] for linear in linears}
    return _linears(training, linears, adapters, rows, batch, passes_on=passes_on).total()


def _head(training: Training, batch: MicroBatch) -> int:
    """Logits of one chunk and a copy of them in the forward pass; in the backward pass of a trained head, its gradient
    too, twice."""
    shapes = training.shapes
    chunk = min(batch.responses, max(1, CHUNK_BYTES // (_FLOAT * shapes.vocab))) * shapes.vocab
    forward = 2 * _FLOAT * chunk
    if not training.full:
        return forward
    cast = training.itemsize if training.itemsize < _FLOAT else 0
    head = shapes.vocab * shapes.hidden * (_FLOAT + training.itemsize)
    return max(forward, (_FLOAT + cast) * chunk + head)


_MLP_COPIES, _WIDTH_COPIES = 3, 4


def _backward(training: Training, batch: MicroBatch) -> int:
    """Gradients of activations within one layer's backward pass, which is largest in its MLP. Measured."""
    shapes, size = training.shapes, training.itemsize
    passing = batch.tokens * (_MLP_COPIES * shapes.mlp + _WIDTH_COPIES * shapes.hidden) * size
    largest = max(linear.weights for index in range(shapes.layers) for linear in shapes.layer(index))
    if training.quantize:
        passing += largest * 2 * size  # one weight, expanded, and a part of its scratch
    if training.full:
        passing += largest * _FLOAT
    return passing
