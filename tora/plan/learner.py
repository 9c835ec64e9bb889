"""The peak memory of one learner rank, by part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tora.plan.activations import MicroBatch, activations
from tora.plan.training import MASTER, Training


@dataclass(frozen=True, slots=True)
class LearnerMemory:
    """Bytes on the learner's device."""

    held: Counter[str]
    """Throughout the run."""
    gradients: int
    """While a step runs."""
    activations: Counter[str]
    """At the end of a micro-batch's forward pass, by type of layer."""
    passing: int
    """The most that a step has beside all that at any time."""
    updating: int
    """What the optimizer's step has beside `held` and gradients, when no activations are left."""

    @property
    def peak(self) -> int:
        step = max(self.activations.total() + self.passing, self.updating)
        return self.held.total() + self.gradients + step


def learner_memory(
    training: Training, batch: MicroBatch, *, ranks: int = 1, cpu_offload: bool = False, reshard: bool = True
) -> LearnerMemory:
    """`ranks`: learner ranks that share weights, gradients and optimizer state. `cpu_offload`: they hold their shares
    in CPU memory. `reshard`: `fsdp_reshard_after_forward`."""
    share = 0 if cpu_offload else 1
    held = Counter(
        {
            "base weights": training.base_bytes * share // ranks,
            "adapters": training.adapter_bytes * share // ranks,
            "optimizer state": training.optimizer_bytes * share // ranks,
            "KL reference": training.reference_bytes * share // ranks,
            "gathered weights": gathered_bytes(training, ranks, reshard=reshard),
        }
    )
    gradients = training.gradient_bytes * share // ranks
    peak = activations(training, batch)
    # torch's optimizers update all weights at once on a GPU, with one temporary of their size
    updating = gradients if batch.on_gpu else 0
    return LearnerMemory(held, gradients, peak.saved, peak.passing, updating)


def gathered_bytes(training: Training, ranks: int, *, reshard: bool) -> int:
    """Full weights that FSDP2 gathers: embedding, head and two layers at a time, or all layers; for trained layers
    also one layer's gradients, in the compute dtype and in float32. A single rank gathers only to cast."""
    shapes, casts = training.shapes, training.itemsize < MASTER and training.master_weights > 0
    if ranks == 1 and not casts:
        return 0
    layer = shapes.layer_weights * training.itemsize
    if training.quantize:
        layer = layer * 33 // 128
    tables = shapes.table_weights * training.itemsize
    gradients = shapes.layer_weights * (training.itemsize + MASTER) if training.full else 0
    return tables + layer * (2 if reshard else shapes.layers) + gradients
