"""Inside vLLM's worker: the base weights that it serves, as views by Hugging Face name.

vLLM packs q, k and v, and gate and up, into one matrix each. A module's weight is a range of that matrix's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from actors.vllm_engine.slot_places import renamer

_BASE = ".base_layer"
"""What vLLM appends to the name of a layer that it wraps for adapters."""


def base_views(model: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Views of the parameters with these Hugging Face names, as far as they are in memory as loaded: linear layers,
    embedding and head. Each is a whole matrix only without tensor parallelism, and only where vLLM does not repack
    weights for its kernels, as it does on a CPU."""
    views, rename = dict(_all_views(model)), renamer(model)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        view = views.get(f"{rename(module)}.{leaf}")
        if view is not None:
            found[name] = view
    return found


def _all_views(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """By vLLM's name for the unpacked module, and `weight` or `bias`."""
    packed = getattr(model, "packed_modules_mapping", {})
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase | VocabParallelEmbedding):
            continue
        plain = name.removesuffix(_BASE)
        leaf = plain.rpartition(".")[2]
        stem = plain.removesuffix(leaf)
        parts, sizes = packed.get(leaf, [leaf]), getattr(module, "output_sizes", [])
        for parameter in ("weight", "bias"):
            tensor = getattr(module, parameter, None)
            if not isinstance(tensor, torch.Tensor):
                continue
            rows = list(sizes) if len(parts) > 1 else [getattr(module, "org_vocab_size", len(tensor))]
            if len(rows) == len(parts) and sum(rows) <= len(tensor):
                for part, view in zip(parts, tensor.detach()[: sum(rows)].split(rows), strict=True):
                    yield f"{stem}{part}.{parameter}", view
