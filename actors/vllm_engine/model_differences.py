"""Where vLLM 0.32 serves a model otherwise than its files and transformers have it, and Tora sets it right.

Each is shown on a tiny model by `tests/integration/test_vllm_families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import vllm.lora.model_manager as lora_manager
import vllm.model_executor.layers.fused_moe.layer as moe_layer
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig


def install() -> None:
    """Call before the model is built."""
    setattr(moe_layer, "FusedMoEConfig", _BaseExperts)  # noqa: B010
    mapping: Any = getattr(lora_manager, "process_packed_modules_mapping")  # noqa: B009  (pyright: not exported)
    if not isinstance(mapping, partial):
        setattr(lora_manager, "process_packed_modules_mapping", partial(_as_stored, mapping))  # noqa: B010


class _BaseExperts(FusedMoEConfig):
    """Experts without adapters, which Tora does not train.

    vLLM gives the experts of every engine that serves LoRA its Triton kernel, which a CPU does not have, whether or not
    an adapter is on them.
    """

    def __post_init__(self) -> None:
        self.is_lora_enabled = False
        super().__post_init__()


def _as_stored(mapping: Any, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """vLLM's table of the modules that each of its layers packs, where the model's files agree.

    GLM-4's `gate_up_proj` is one module to transformers and two to vLLM, which then takes no adapter for it.
    """
    folder = Path(get_current_vllm_config().model_config.model)
    return unpacked_as_stored(mapping(*args, **kwargs), stored_modules(folder))


def unpacked_as_stored(mapping: Mapping[str, Sequence[str]], stored: set[str]) -> dict[str, list[str]]:
    """`mapping`, in which a layer that is stored whole, and none of its parts, packs only itself. `stored`: last names
    of the modules that have weights."""
    return {
        layer: [layer] if layer in stored and not stored & set(parts) else list(parts)
        for layer, parts in mapping.items()
    }


def stored_modules(folder: Path) -> set[str]:
    """Last names of the modules that have a weight in a folder's safetensors files."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names.update(handle.keys())
    return {name.split(".")[-2] for name in names if name.endswith(".weight") and name.count(".") > 1}
