"""vLLM's own LoRA layers with our gains, outside an engine: one decoder layer's worth, of any tensor-parallel rank.

Import vLLM, or set up what it needs to be told first, before this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import vllm.lora.utils as lora_utils
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from actors.vllm_engine import dora_layers
from actors.vllm_engine.config import HAS_GAINS
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B

HIDDEN, HEAD, HEADS, KV_HEADS, WIDE = 32, 16, 4, 2, 48
SIZES = {
    "q_proj": (HIDDEN, HEADS * HEAD),
    "k_proj": (HIDDEN, KV_HEADS * HEAD),
    "v_proj": (HIDDEN, KV_HEADS * HEAD),
    "gate_proj": (HIDDEN, WIDE),
    "up_proj": (HIDDEN, WIDE),
    "down_proj": (WIDE, HIDDEN),
}
"""Inputs and outputs of each module."""
PACKED = {"qkv": ["q_proj", "k_proj", "v_proj"], "gate_up": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
SLOTS, RANK_MAX = 3, 16


def weights(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """W [O, I] and bias [O] of each module, float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(o, i, generator=generator) / i**0.5, torch.randn(o, generator=generator))
        for name, (i, o) in SIZES.items()
    }


def adapter(modules: Sequence[str], rank: int, seed: int, *, gains: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """In the wire format. `gains`: the modules that have one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        size_in, size_out = SIZES[name]
        tensors[name + LORA_A] = torch.randn(rank, size_in, generator=generator) / size_in**0.5
        tensors[name + LORA_B] = torch.randn(size_out, rank, generator=generator) / rank**0.5
        if name in gains:
            tensors[name + GAIN] = 1 + 0.3 * torch.randn(size_out, generator=generator)
    return tensors


def layers(
    dtype: torch.dtype,
    *,
    rank: int = 0,
    ranks: int = 1,
    device: str = "cpu",
    bias: bool = True,
    gains: bool = True,
) -> dict[str, Any]:
    """qkv, gate_up and down_proj with empty slots, holding this rank's part of `weights`."""
    config = LoRAConfig(max_lora_rank=RANK_MAX, max_loras=SLOTS, lora_dtype=dtype)
    dora_layers.install()
    given: dict[str, Any] = {"bias": bias, "params_dtype": dtype}
    with _tensor_parallel(rank, ranks), _vllm_config(gains), torch.device(device):
        bases = {
            "qkv": QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix="qkv", **given),
            "gate_up": MergedColumnParallelLinear(HIDDEN, [WIDE, WIDE], prefix="gate_up", **given),
            "down_proj": RowParallelLinear(WIDE, HIDDEN, prefix="down_proj", **given),
        }
        made = {
            name: lora_utils.from_layer(base, SLOTS, config, PACKED[name] if len(PACKED[name]) > 1 else [])
            for name, base in bases.items()
        }
    for name, base in bases.items():
        parts = [weights()[module] for module in PACKED[name]]
        with torch.no_grad():
            base.weight.copy_(torch.cat([share(name, w, rank, ranks) for w, _ in parts]))
            if bias:
                row_parallel = name == "down_proj"
                base.bias.copy_(torch.cat([b if row_parallel else share(name, b, rank, ranks) for _, b in parts]))
    return made


def share(layer: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A tensor-parallel rank's rows of W, B, gain or bias, or for down_proj its columns of W or A."""
    return tensor.chunk(ranks, dim=1 if layer == "down_proj" else 0)[rank]


def manager(made: Mapping[str, Any]) -> Any:
    """What `adapter_slots` uses of vLLM's adapter manager."""
    found = SimpleNamespace(
        modules=made,
        packed_modules=PACKED,
        model=SimpleNamespace(),
        lora_index_to_id=[None] * SLOTS,
        lora_config=SimpleNamespace(max_lora_rank=RANK_MAX),
        _registered_adapters={},
    )
    found.activate_adapter = lambda i: found.lora_index_to_id.__setitem__(found.lora_index_to_id.index(None), i)
    return found


def _vllm_config(gains: bool) -> AbstractContextManager[Any]:
    return set_current_vllm_config(VllmConfig(additional_config={HAS_GAINS: gains}))


@contextmanager
def _tensor_parallel(rank: int, ranks: int) -> Iterator[None]:
    """vLLM's layers ask its tensor-parallel group for their place in it, and nothing else at construction."""
    before = parallel_state._TP
    setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=rank, world_size=ranks))  # noqa: B010
    try:
        yield
    finally:
        setattr(parallel_state, "_TP", before)  # noqa: B010
