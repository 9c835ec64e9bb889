"""vLLM's Triton LoRA kernels and GPU wrapper with our gain layers on top, run by Triton's interpreter on a CPU.

A program of its own, because Triton reads its settings at import. Prints a JSON object: for each case, the largest
error against the float32 formula, relative to the largest output. In float16: the interpreter's bfloat16 is wrong by
orders.
"""

from __future__ import annotations

import triton_on_cpu  # noqa: F401

# isort: split
import json
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops import lora_shrink_op
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.triton_utils import HAS_TRITON
from vllm_layers import PACKED, SIZES, SLOTS, adapter, layers, manager, weights

from actors.vllm_engine import adapter_slots, gpu_lora
from actors.vllm_engine.streams import HostStreams
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, pack, split_by_module

PADDED = 24
"""Rows of a batch as a CUDA graph pads it."""
IDS = [11, None, 12]
"""vLLM's adapter ids by slot. A token without adapter has id 0."""
ADAPTERS = {
    "lora": {11: adapter(list(SIZES), 16, 1), 12: adapter(list(SIZES), 16, 2)},
    "dora": {11: adapter(list(SIZES), 16, 1, gains=list(SIZES)), 12: adapter(list(SIZES), 16, 2, gains=list(SIZES))},
    "lora beside dora": {11: adapter(list(SIZES), 16, 1), 12: adapter(list(SIZES), 16, 2, gains=list(SIZES))},
    "parts of packed layers": {
        11: adapter(["q_proj", "v_proj"], 3, 1, gains=["q_proj"]),
        12: adapter(["up_proj"], 8, 2, gains=["up_proj"]),
    },
}
BATCHES = {
    "mixed": [0, 11, 11, 12, 0, 12, 11, 12, 0, 0, 12],
    "without adapter": [0] * 7,
    "one adapter": [12] * 5,
    "after a longer batch": [11, 0, 12],
}


def few_programs(inner: Any) -> Any:
    """vLLM's sizes of a kernel, but its sum over inputs split in 2 rather than 64: the interpreter runs every part of
    the grid in Python."""
    return lambda *args, **kwargs: {**inner(*args, **kwargs), "split_k": 2, "block_k": 16}


def wrapper(dtype: torch.dtype) -> PunicaWrapperGPU:
    config = LoRAConfig(max_lora_rank=16, max_loras=SLOTS, lora_dtype=dtype)
    return PunicaWrapperGPU(PADDED, PADDED, "cpu", lora_config=config)


def engine_layers(dtype: torch.dtype, sent: dict[int, Any], rank: int, ranks: int, punica: PunicaWrapperGPU) -> Any:
    made = layers(dtype, rank=rank, ranks=ranks)
    for layer in made.values():
        layer.base_layer.quant_method = types.SimpleNamespace(apply=lambda own, x, bias: F.linear(x, own.weight, bias))
        layer.set_mapping(punica)
    slots = manager(made)
    slots.lora_index_to_id = list(IDS)
    for adapter_id, tensors in sent.items():
        staged = adapter_slots.stage(slots, pack(1, tensors), split_by_module(tensors), HostStreams())
        adapter_slots.write(slots, IDS.index(adapter_id), staged.placed)
    return made


def formula(module: str, x: torch.Tensor, sent: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """gain ⊙ (W x + B A x) + bias in float32, of the weights as the engine holds them."""
    w, bias = (t.to(dtype).float() for t in weights()[module])
    own = split_by_module(sent).get(module)
    y = x.float() @ w.T
    if own is not None:
        a, b = own[LORA_A].to(dtype).float(), own[LORA_B].to(dtype).float()
        y = (y + x.float() @ a.T @ b.T) * own.get(GAIN, torch.ones(len(b)))
    return y + bias


def check(kind: str, dtype: torch.dtype, ranks: int) -> dict[str, float]:
    sent = ADAPTERS[kind]
    punica = wrapper(dtype)
    made = [engine_layers(dtype, sent, rank, ranks, punica) for rank in range(ranks)]
    generator = torch.Generator().manual_seed(5)
    errors = {}
    for name, ids in BATCHES.items():
        punica.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True), IDS, SLOTS, 100)
        rows = [*ids, *[0] * (PADDED - len(ids))]
        worst = 0.0
        for layer, modules in PACKED.items():
            x = torch.randn(len(rows), SIZES[modules[0]][0], generator=generator).to(dtype)
            want = torch.cat([_each_row(module, x, rows, sent, dtype) for module in modules], 1)
            found = _outputs([own[layer] for own in made], layer, x)
            assert found.isfinite().all(), "rows of padding are finite"
            if name != "mixed":  # the first batch's padding is the base's, a later one's is an earlier batch's
                found, want = found[: len(ids)], want[: len(ids)]
            worst = max(worst, float((found - want).abs().max() / want.abs().max()))
        errors[name] = worst
    return errors


def _each_row(module: str, x: torch.Tensor, rows: Sequence[int], sent: Any, dtype: torch.dtype) -> torch.Tensor:
    by_id = {i: formula(module, x, sent.get(i, {}), dtype) for i in set(rows)}
    return torch.stack([by_id[i][row] for row, i in enumerate(rows)])


def _outputs(parts: Sequence[Any], name: str, x: torch.Tensor) -> torch.Tensor:
    """The whole layer's output, joined or summed over tensor-parallel ranks as vLLM does."""
    if name == "down_proj":
        shares = x.chunk(len(parts), dim=1)
        biases = [parts[0].base_layer.bias, *[None] * (len(parts) - 1)]  # as RowParallelLinearWithLoRA passes it
        return torch.stack(
            [
                layer.apply(share.contiguous(), bias).float()
                for layer, share, bias in zip(parts, shares, biases, strict=True)
            ]
        ).sum(0)
    outputs = [layer.apply(x, layer.base_layer.bias).float().split(layer.part_sizes, 1) for layer in parts]
    return torch.cat([torch.cat(module, 1) for module in zip(*outputs, strict=True)], 1)


def main() -> None:
    assert HAS_TRITON
    gpu_lora.wrap(PunicaWrapperGPU)
    lora_shrink_op.get_lora_op_configs = few_programs(lora_shrink_op.get_lora_op_configs)
    found = {
        f"{kind}, {str(dtype)[6:]}, {ranks} ranks, {batch}": error
        for kind in ADAPTERS
        for dtype in (torch.float16, torch.float32)
        for ranks in (1, 2)
        for batch, error in check(kind, dtype, ranks).items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
