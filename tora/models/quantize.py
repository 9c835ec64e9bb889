"""A frozen base in NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3): quantising and computing with it.

torchao's `NF4Tensor` has a 4-bit code per weight, an int8 scaler per block of 64 weights and a float factor per block
of scalers, 4.13 bits a weight in all. Scalers are stored relative to their mean over the tensor, so a weight must be
quantised first and sharded afterwards.

Shape letters: I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torchtune  # noqa: F401  (before torchao: its import fix gives NF4 one address in all of torchao's versions)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4  # pyright: ignore[reportMissingImports]

from tora.errors import ConfigError

BLOCK_SIZE = 64
MAX_SCALER_BLOCK_SIZE = 64
"""With torchao's default of 256, Qwen2.5-0.5B cannot be sharded. 64 costs 0.003 bits a weight more."""
_ROW_SHARDS = 8
"""The largest number of ranks that `scaler_block_size` provides for."""
_SLAB_ROWS = 1024
"""Rows dequantised at a time; a multiple of the block size, so that a slab is whole blocks at any width."""


def is_quantized(name: str) -> bool:
    """Whether `quantize_base` quantises this parameter of `Decoder`: weights of the layers' linear modules, adapted or
    not, but no embedding, head, norm or bias."""
    return name.startswith("layers.") and name.endswith(".weight")


def scaler_block_size(num_rows: int, num_columns: int) -> int:
    """The largest power of two up to 64 for which each of up to 8 ranks that share the rows gets whole scaler blocks.

    It does not depend on the actual number of ranks, so that the policy does not either.
    """
    numel, shards = num_rows * num_columns, math.gcd(num_rows, _ROW_SHARDS)
    blocks = numel // BLOCK_SIZE
    if blocks % shards == 0:
        blocks //= shards
    return math.gcd(blocks, MAX_SCALER_BLOCK_SIZE)


def quantize(weight_OI: torch.Tensor, name: str) -> NF4Tensor:
    """Quantise on the weight's device. Raises ConfigError, naming `name`, if blocks do not divide the weight."""
    if weight_OI.ndim != 2 or weight_OI.numel() % BLOCK_SIZE:
        raise ConfigError(
            f"model.quantize_base=true: {name} has shape {tuple(weight_OI.shape)}, and NF4 needs a matrix whose number "
            f"of weights is a multiple of {BLOCK_SIZE}."
        )
    quantized = to_nf4(weight_OI.contiguous(), BLOCK_SIZE, scaler_block_size(*weight_OI.shape))
    if weight_OI.device.type == "cpu":
        _return_free_memory()
    return quantized


def _return_free_memory() -> None:
    """Return freed memory to the system: glibc would otherwise retain more scratch memory than the unquantised model
    needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_shards(model: nn.Module, num_ranks: int) -> None:
    """Raises ConfigError if the rows of some NF4 weight cannot be shared equally in whole scaler blocks."""
    weights: dict[str, Any] = dict(model.named_parameters())
    for name, weight in weights.items():
        if not isinstance(weight, NF4Tensor):
            continue
        rows, columns = weight.shape
        if rows % num_ranks or rows // num_ranks * columns % (BLOCK_SIZE * weight.scaler_block_size):
            raise ConfigError(
                f"learner_ranks={num_ranks} cannot share {name}, an NF4 matrix of {rows} x {columns}, in whole blocks; "
                f"1, 2, 4 and 8 work for every released model."
            )


def _scalers(weight: NF4Tensor) -> torch.Tensor:
    """The dequantised scaler of each block, [blocks]."""
    return weight.dequantize_scalers(weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size)


def _decode(weight: NF4Tensor, scalers: torch.Tensor, first_row: int, last_row: int) -> torch.Tensor:
    """Rows [first, last), bit for bit those of `get_original_weight`, with a quarter of its scratch memory."""
    first, last, block = first_row * weight.shape[1], last_row * weight.shape[1], weight.block_size
    codes, scalers = weight.quantized_data[first // 2 : last // 2], scalers[first // block : last // block]
    # the compiler's table lookup is eight times slower than torch's on a CPU, and faster on a GPU
    opaque = torch.compiler.is_compiling() and codes.device.type == "cpu"
    return (_decode_op if opaque else _decode_codes)(codes, scalers, weight.nf4).view(-1, weight.shape[1])


def _decode_codes(codes: torch.Tensor, scalers: torch.Tensor, values_16: torch.Tensor) -> torch.Tensor:
    """Packed codes (uint8, two each), scalers by block and the 16 code values -> weights [blocks, block size], in the
    dtype of `values_16`."""
    if torch.compiler.is_compiling():
        values = _pairs(values_16)[codes.int()]
    else:  # look up as many weights at a time as fit into 64 bits
        table = _table(values_16)
        wide = codes if len(table) == 256 else codes.view(torch.uint16)
        values = table.index_select(0, wide.int()).view(values_16.dtype)
    return values.view(len(scalers), -1) * scalers[:, None]


def _pairs(values_16: torch.Tensor) -> torch.Tensor:
    """The two weights of each byte, [256, 2]; the one of the high bits first."""
    return torch.stack([values_16.repeat_interleave(16), values_16.repeat(16)], -1)


_tables: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _table(values_16: torch.Tensor) -> torch.Tensor:
    """The weights of each byte, or for 2-byte dtypes of each pair of bytes, packed as int64: [256] or [65536].

    Cached by dtype and device, of which `values_16` is a function.
    """
    key = values_16.dtype, values_16.device
    if key not in _tables:
        pairs = _pairs(values_16)
        if values_16.itemsize == 2:
            pairs = torch.cat([pairs.repeat(256, 1), pairs.repeat_interleave(256, 0)], 1)  # the low byte comes first
        _tables[key] = pairs.view(torch.int64)[:, 0].contiguous()
    return _tables[key]


_decode_op = torch.library.custom_op("tora::decode_nf4", _decode_codes, mutates_args=())


@_decode_op.register_fake
def _(codes: torch.Tensor, scalers: torch.Tensor, values_16: torch.Tensor) -> torch.Tensor:
    return values_16.new_empty(scalers.shape[0], 2 * codes.shape[0] // scalers.shape[0])


def _cache_key(weight: NF4Tensor) -> str:
    """Everything that compiled code may depend on. Without this method torch warns and bypasses its compile cache."""
    sizes = (weight.shape, weight.stride(), weight.block_size, weight.scaler_block_size, weight.n_blocks)
    return repr((*map(tuple, sizes[:2]), *sizes[2:], weight.dtype, weight.device))


setattr(NF4Tensor, "_stable_hash_for_caching", _cache_key)  # noqa: B010


def dequantize(weight: NF4Tensor) -> torch.Tensor:
    """The full weight [O, I], in the dtype that it was quantised from."""
    return _decode(weight, _scalers(weight), 0, weight.shape[0])


def row_slabs(weight_OI: torch.Tensor) -> Iterator[torch.Tensor]:
    """Slabs of rows in float32, so that a bf16 or NF4 weight is never copied to float32 as a whole."""
    if not isinstance(weight_OI, NF4Tensor):
        yield from (slab.float() for slab in weight_OI.split(_SLAB_ROWS))
        return
    scalers, num_rows = _scalers(weight_OI), weight_OI.shape[0]
    for row in range(0, num_rows, _SLAB_ROWS):
        yield _decode(weight_OI, scalers, row, min(row + _SLAB_ROWS, num_rows)).float()


class _NF4Product(torch.autograd.Function):
    """x Wᵀ for a frozen W. Saves W's codes for the backward pass and decodes them again there; does not save x, which
    only W's gradient would need."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: NF4Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        return F.linear(x, dequantize(weight).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return gradient @ dequantize(weight).to(gradient.dtype), None


def frozen_linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """W x + b for a frozen plain or NF4 weight; [..., I] -> [..., O], computed in x's dtype."""
    if not isinstance(weight_OI, NF4Tensor):
        return F.linear(x, weight_OI, bias_O)
    if torch.compiler.is_compiling():
        # Forward and backward decode the same weight; without the checkpoint the compiler would keep it decoded.
        # The product is outside the checkpoint, so that it is not recomputed.
        decoded = checkpoint(dequantize, weight_OI, use_reentrant=False, preserve_rng_state=False)
        return F.linear(x, decoded.to(x.dtype), bias_O)
    y = _NF4Product.apply(x, weight_OI)
    return y if bias_O is None else y + bias_O


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is frozen and may be NF4."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_linear(input, self.weight, self.bias)
