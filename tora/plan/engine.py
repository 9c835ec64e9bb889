"""The memory of one engine, and how many rollouts its key-value cache holds.

vLLM takes a share of a GPU. What its weights, adapter slots and largest step leave of it becomes the cache.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tora.plan.training import MASTER, Training

BATCHED_TOKENS = 8192
"""Tokens of vLLM's largest step on a GPU, `actors.vllm_engine.arguments`."""
AWAKE = ("engine weights", "adapter slots", "CUDA graphs")
"""What vLLM holds while it sleeps: all but its cache and what a step needs."""
_LOGITS_COPIES = 4
"""Float32 tensors of the size of the logits that sampling needs at a time: logits, log-probs, and those sorted."""
_GRAPHS = 1 << 29
"""CUDA graphs: an estimate."""
_GROWTH = 1.25
"""The torch engine's cache grows by a quarter."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine is asked for."""

    kind: str
    """`vllm` or `torch`."""
    itemsize: int
    rows: int
    """Rollouts decoded at once."""
    longest: int
    """Tokens of a sequence."""
    slots: int
    """Adapters held at once."""
    rank: int
    """Of vLLM's adapter slots."""
    cache_bytes: int
    """vLLM's cache on a CPU."""
    graphs: bool
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on one device."""

    held: Counter[str]
    """Throughout the run, without the cache."""
    cache: int
    """Negative if not even the rest fits."""
    rollouts: int
    """Sequences of the longest length that the cache holds."""

    @property
    def total(self) -> int:
        return self.held.total() + max(0, self.cache)


def vllm_memory(training: Training, limits: EngineLimits, budget: int | None) -> EngineMemory:
    """`budget`: bytes of the GPU that vLLM takes; None on a CPU."""
    shapes, size, shards = training.shapes, limits.itemsize, limits.tensor_parallel
    adapters = [adapter for layer in training.layers for adapter in layer.values()] if limits.slots else []
    per_slot = sum(
        limits.rank * (a.linear.inputs + a.linear.outputs) * size + a.linear.outputs * MASTER for a in adapters
    )
    held = Counter({"engine weights": shapes.weights * size // shards, "adapter slots": limits.slots * per_slot})
    if budget is not None:
        tokens = max(BATCHED_TOKENS, limits.rows)
        step = tokens * (3 * shapes.mlp + shapes.queries + 2 * shapes.keys + 4 * shapes.hidden) * size
        held["engine steps"] = step + limits.rows * shapes.vocab * 4 * _LOGITS_COPIES
        held["CUDA graphs"] = _GRAPHS if limits.graphs else 0
    cache = limits.cache_bytes if budget is None else budget - held.total()
    return EngineMemory(held, cache, max(0, cache) // shapes.kv_per_sequence(limits.longest, size, shards))


def torch_memory(training: Training, limits: EngineLimits, *, shares: bool) -> EngineMemory:
    """The cache of the torch engine grows with its rollouts; at its largest it holds all of them. `shares`: it
    generates with the learner's own weights."""
    shapes, size = training.shapes, limits.itemsize
    weights = 0 if shares else training.base_bytes + training.adapter_bytes
    # weights that are held as float32 masters are cast for the engine
    casts = training.master_weights * size if size < MASTER and shares else 0
    step = limits.rows * shapes.vocab * 4 * _LOGITS_COPIES
    held = Counter({"engine weights": weights + casts, "engine steps": step})
    cache = limits.rows * shapes.kv_per_sequence(round(limits.longest * _GROWTH), size)
    return EngineMemory(held, cache, limits.rows)
