"""What is trained, and the bytes of weights, gradients and optimizer state.

Adapters are float32 beside a base in the run's dtype. Weights that are themselves trained in bf16 are float32 masters,
which FSDP2 casts unit by unit (`learner.fsdp.sharder`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tora.adapters.peft_config import PeftConfig, by_pattern, matches
from tora.config.schema import RunConfig
from tora.plan.shapes import Linear, Shapes, tower_linears

MASTER = 4
"""Bytes of a trained weight and of its gradient."""
NF4_BITS = 4.13
_STATE = {
    "sgd": 0.0,
    "adafactor": 0.1,
    "lion": 4.0,
    "muon": 4.0,
    "rmsprop": 4.0,
    "adagrad": 4.0,
    "adamw8bit": 2.1,
    "adam8bit": 2.1,
    "pagedadamw8bit": 2.1,
    "adamw4bit": 1.1,
    "adamwfp8": 2.1,
}
"""Bytes that an optimizer keeps for each trained weight, by the last part of its path in lower case."""
_ADAM = 8.0
"""The same for Adam, and for optimizers that are not known."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of one linear layer."""

    linear: Linear
    rank: int
    dora: bool

    @property
    def weights(self) -> int:
        return self.rank * (self.linear.inputs + self.linear.outputs) + (self.linear.outputs if self.dora else 0)


@dataclass(frozen=True, slots=True)
class Training:
    """What a run trains of a model."""

    shapes: Shapes
    kind: str
    """`model.lora_type`."""
    itemsize: int
    """Bytes of a number in the run's dtype: 2 or 4."""
    layers: tuple[dict[str, Adapter], ...]
    """Each decoder layer's adapters, by the layer's name within it; empty with `full`."""
    tower: tuple[tuple[str, Adapter], ...]
    """The vision tower's adapters by full name."""
    vision: str
    """`model.train_vision`, or `full` with a wholly trained tower."""
    quantize: bool
    dropout: bool
    state_bytes: float
    """Of the optimizer for each trained weight."""
    reference: bool
    """Whether a frozen copy of the model is kept for the KL term."""
    frozen_copies: int
    """Trained weights of which the KL term keeps a frozen copy."""

    @property
    def full(self) -> bool:
        return self.kind == "full"

    @property
    def adapter_weights(self) -> int:
        decoder = sum(adapter.weights for layer in self.layers for adapter in layer.values())
        return decoder + sum(adapter.weights for _, adapter in self.tower)

    @property
    def master_weights(self) -> int:
        """Weights of the model itself that are trained."""
        tower = self.shapes.tower.weights if self.shapes.tower and self.vision == "full" else 0
        return tower + (self.shapes.decoder_weights if self.full else 0)

    @property
    def base_bytes(self) -> int:
        """Of the model without its adapters, unsharded."""
        shapes = self.shapes
        frozen = 0 if self.full else self._frozen_decoder_bytes(self.itemsize)
        if shapes.tower and self.vision != "full":
            frozen += shapes.tower.weights * self.itemsize
        return frozen + self.master_weights * MASTER

    def _frozen_decoder_bytes(self, itemsize: int) -> int:
        shapes = self.shapes
        quantized = shapes.quantized_weights if self.quantize else 0
        others = shapes.decoder_weights - shapes.norm_weights - quantized
        return round(quantized * NF4_BITS / 8) + others * itemsize + shapes.norm_weights * 4

    @property
    def adapter_bytes(self) -> int:
        """Adapters, with the row norms that DoRA caches."""
        adapters = [*(a for layer in self.layers for a in layer.values()), *(a for _, a in self.tower)]
        norms = {"dora": 1, "dora_cache": 2}.get(self.kind, 0) * sum(a.linear.outputs for a in adapters)
        return (self.adapter_weights + norms) * MASTER

    @property
    def gradient_bytes(self) -> int:
        return (self.adapter_weights + self.master_weights) * MASTER

    @property
    def optimizer_bytes(self) -> int:
        return round((self.adapter_weights + self.master_weights) * self.state_bytes)

    @property
    def reference_bytes(self) -> int:
        """The frozen policy of the KL term."""
        whole = self.shapes.weights * self.itemsize if self.reference else 0
        return whole + self.frozen_copies * MASTER


def training_of(cfg: RunConfig, shapes: Shapes, start: PeftConfig | None = None) -> Training:
    """`start`: the config of the PEFT folder `model.adapter_path`, whose patterns give single layers another rank."""
    model, full = cfg.model, cfg.model.lora_type == "full"
    ranks = start.rank_pattern if start else {}
    dora = model.lora_type.startswith("dora")

    def adapter(name: str, linear: Linear) -> Adapter:
        return Adapter(linear, int(by_pattern(ranks, name, model.lora_rank)), dora)

    layers = [
        {}
        if full
        else {
            linear.name: adapter(name, linear)
            for linear in shapes.layer(index)
            if matches(model.lora_targets, name := shapes.name(index, linear))
        }
        for index in range(shapes.layers)
    ]
    tower: Iterator[tuple[str, Linear]] = tower_linears(shapes.tower) if shapes.tower else iter(())
    training = Training(
        shapes=shapes,
        kind=model.lora_type,
        itemsize=itemsize(cfg.dtype),
        layers=tuple(layers),
        tower=tuple((name, adapter(name, each)) for name, each in tower) if model.train_vision == "lora" else (),
        vision=model.train_vision,
        quantize=model.quantize_base,
        dropout=model.lora_dropout > 0 and not full,
        state_bytes=state_bytes(cfg.optimizer),
        reference=full and kl_coeff(cfg) > 0,
        frozen_copies=0,
    )
    copied = 0
    if kl_coeff(cfg) > 0 and not full:
        from_adapter = model.adapter_path is not None and cfg.loss.get("reference", "initial") == "initial"
        copied = training.master_weights + (training.adapter_weights if from_adapter else 0)
    return _replace(training, frozen_copies=copied)


def _replace(training: Training, **changes: Any) -> Training:
    from dataclasses import replace

    return replace(training, **changes)


def itemsize(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def kl_coeff(cfg: RunConfig) -> float:
    value = cfg.loss.get("kl_coeff", 0.0)
    return value if isinstance(value, int | float) else 0.0


def state_bytes(optimizer: dict[str, Any]) -> float:
    """Bytes of the optimizer's state for each trained weight."""
    name = str(optimizer.get("_component_", "")).rpartition(".")[2].lower()
    if name == "sgd" and optimizer.get("momentum"):
        return 4.0
    return _STATE.get(name, _ADAM + (4.0 if optimizer.get("amsgrad") else 0.0))
