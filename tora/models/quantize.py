"""A frozen base in NF4 (QLoRA, Dettmers et al. 2023, section 3): how it is quantised, and how layers compute with it.

torchao's `NF4Tensor`: a 4-bit code a weight, an int8 scaler for each block of 64 weights, and a factor for each block
of scalers; 4.13 bits a weight. Scalers are kept relative to their mean, of which a tensor has one: a weight is
quantised whole and then sharded, never shard by shard.
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
"""torchao's own 256 leaves Qwen2.5-0.5B without a way to shard; 64 costs 0.003 bits a weight."""
_ROW_SHARDS = 8
_SLAB_ROWS = 1024
"""Of any width a whole number of blocks."""


def is_quantized(name: str) -> bool:
    """Whether `quantize_base` applies to a parameter of `Decoder`: the linear layers' weights, adapted or not. Never
    the embedding, the head, norms or biases."""
    return name.startswith("layers.") and name.endswith(".weight")


def scaler_block_size(num_rows: int, num_columns: int) -> int:
    """The largest power of two, up to 64, that leaves every rank whole scaler blocks where up to 8 share the rows.

    The number of ranks has no part in it, so that a policy is the same on any.
    """
    numel, shards = num_rows * num_columns, math.gcd(num_rows, _ROW_SHARDS)
    blocks = numel // BLOCK_SIZE
    if blocks % shards == 0:
        blocks //= shards
    return math.gcd(blocks, MAX_SCALER_BLOCK_SIZE)


def quantize(weight_OI: torch.Tensor, name: str) -> NF4Tensor:
    """On the weight's own device. `name` is for the error: ConfigError where blocks do not divide the weight."""
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
    """To the system: the GNU C library would hoard more scratch memory than the whole model takes unquantised."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_shards(model: nn.Module, num_ranks: int) -> None:
    """Errors: ConfigError where a rank's equal share of some NF4 weight's rows is not whole scaler blocks."""
    weights: dict[str, Any] = dict(model.named_parameters())
    for name, weight in weights.items():
        if not isinstance(weight, NF4Tensor):
            continue
        rows, columns = weight.shape
        if rows % num_ranks or rows // num_ranks * columns % (BLOCK_SIZE * weight.scaler_block_size):
            raise ConfigError(
                f"learner_ranks={num_ranks} cannot share {name}, an NF4 matrix of {rows} x {columns}, in whole blocks; "
                f"1, 2, 4 and 8 suit every released model."
            )


def _scalers(weight: NF4Tensor) -> torch.Tensor:
    return weight.dequantize_scalers(weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size)


def _decode(weight: NF4Tensor, scalers: torch.Tensor, first_row: int, last_row: int) -> torch.Tensor:
    """Rows [first, last), to the bit as `get_original_weight` has them, with a quarter of its scratch memory."""
    first, last, block = first_row * weight.shape[1], last_row * weight.shape[1], weight.block_size
    codes, scalers = weight.quantized_data[first // 2 : last // 2], scalers[first // block : last // block]
    # on a CPU the compiler's loop over a table is eight times slower than torch's; on a GPU it is the better one
    opaque = torch.compiler.is_compiling() and codes.device.type == "cpu"
    return (_decode_op if opaque else _decode_codes)(codes, scalers, weight.nf4).view(-1, weight.shape[1])


def _decode_codes(codes: torch.Tensor, scalers: torch.Tensor, values_16: torch.Tensor) -> torch.Tensor:
    """uint8 pairs of codes, a scaler for each block, and what the codes mean -> [blocks, block size] in its dtype."""
    if torch.compiler.is_compiling():
        values = _pairs(values_16)[codes.int()]
    else:  # as many weights at once as a 64-bit integer holds
        table = _table(values_16)
        wide = codes if len(table) == 256 else codes.view(torch.uint16)
        values = table.index_select(0, wide.int()).view(values_16.dtype)
    return values.view(len(scalers), -1) * scalers[:, None]


def _pairs(values_16: torch.Tensor) -> torch.Tensor:
    """[256, 2]: the two weights of each byte, that of the high bits first."""
    return torch.stack([values_16.repeat_interleave(16), values_16.repeat(16)], -1)


_tables: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _table(values_16: torch.Tensor) -> torch.Tensor:
    """The weights of each byte, or where they are 2 bytes wide those of each two bytes, as int64. `values_16` is the
    same for all of a dtype."""
    key = values_16.dtype, values_16.device
    if key not in _tables:
        pairs = _pairs(values_16)
        if values_16.itemsize == 2:
            pairs = torch.cat([pairs.repeat(256, 1), pairs.repeat_interleave(256, 0)], 1)  # the first is the low one
        _tables[key] = pairs.view(torch.int64)[:, 0].contiguous()
    return _tables[key]


_decode_op = torch.library.custom_op("tora::decode_nf4", _decode_codes, mutates_args=())


@_decode_op.register_fake
def _(codes: torch.Tensor, scalers: torch.Tensor, values_16: torch.Tensor) -> torch.Tensor:
    return values_16.new_empty(scalers.shape[0], 2 * codes.shape[0] // scalers.shape[0])


def _cache_key(weight: NF4Tensor) -> str:
    """What compiled code may depend on; without it torch's cache of such code complains at length, and is unused."""
    sizes = (weight.shape, weight.stride(), weight.block_size, weight.scaler_block_size, weight.n_blocks)
    return repr((*map(tuple, sizes[:2]), *sizes[2:], weight.dtype, weight.device))


setattr(NF4Tensor, "_stable_hash_for_caching", _cache_key)  # noqa: B010


def dequantize(weight: NF4Tensor) -> torch.Tensor:
    """In the dtype that the weight was quantised from."""
    return _decode(weight, _scalers(weight), 0, weight.shape[0])


def row_slabs(weight_OI: torch.Tensor) -> Iterator[torch.Tensor]:
    """float32 slabs of rows, so that no whole float32 copy of a bf16 or NF4 weight exists."""
    if not isinstance(weight_OI, NF4Tensor):
        yield from (slab.float() for slab in weight_OI.split(_SLAB_ROWS))
        return
    scalers, num_rows = _scalers(weight_OI), weight_OI.shape[0]
    for row in range(0, num_rows, _SLAB_ROWS):
        yield _decode(weight_OI, scalers, row, min(row + _SLAB_ROWS, num_rows)).float()


class _NF4Product(torch.autograd.Function):
    """x Wᵀ. Keeps the codes for the backward pass and decodes them anew there; x, which W's gradient would need, is not
    kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: NF4Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        return F.linear(x, dequantize(weight).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return gradient @ dequantize(weight).to(gradient.dtype), None


def frozen_linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """W x + b for a plain or an NF4 weight that is not trained; [..., I] -> [..., O], computed in x's dtype."""
    if not isinstance(weight_OI, NF4Tensor):
        return F.linear(x, weight_OI, bias_O)
    if torch.compiler.is_compiling():
        # The compiler sees one decoding in the forward and the same in the backward, and would keep the first's result.
        # The product stays outside: where the backward needs it, it is kept.
        decoded = checkpoint(dequantize, weight_OI, use_reentrant=False, preserve_rng_state=False)
        return F.linear(x, decoded.to(x.dtype), bias_O)
    y = _NF4Product.apply(x, weight_OI)
    return y if bias_O is None else y + bias_O


class FrozenLinear(nn.Linear):
    """A linear layer whose weight may be NF4."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_linear(input, self.weight, self.bias)
