"""Tensors that several ranks hold in rows, and tensors that one holds whole, behind the same functions.

FSDP2 leaves rank r of n with rows [r·c, (r+1)·c) of every parameter, c = ceil(rows / n); the last ranks may hold fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows, on every rank: a collective for each call. For many tensors use `gather`."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(all_rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Those of all rows that this rank holds of `like`."""
    if not isinstance(like, DTensor):
        return all_rows
    start, count = _rows(all_rows.shape[0], like.device_mesh.get_local_rank(), like.device_mesh.size())
    return all_rows[start : start + count]


def as_sharded(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a new tensor, one row for each of `like`'s, as part of the whole."""
    if not isinstance(like, DTensor):
        return rows
    shape = (like.shape[0], *rows.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, like.device_mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


@torch.no_grad()
def fill(place: torch.Tensor, all_rows: torch.Tensor) -> None:
    """Copy a whole tensor, which every rank has, into one that may be sharded."""
    local(place).copy_(own_rows(all_rows, place))


@torch.no_grad()
def gather(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All of them whole, on every rank, by one collective. Every rank must call it with the same names."""
    result = {name: t.detach() for name, t in tensors.items()}
    sharded = {name: t for name, t in result.items() if isinstance(t, DTensor)}
    if not sharded:
        return result
    mesh = next(iter(sharded.values())).device_mesh
    mine = torch.cat([t.to_local().contiguous().reshape(-1).view(torch.uint8) for t in sharded.values()])
    sizes = [sum(_nbytes(t, rank, mesh.size()) for t in sharded.values()) for rank in range(mesh.size())]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=mine.device)
    padded[: len(mine)] = mine
    everyones = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyones, padded, group=mesh.get_group())
    offsets = [0] * mesh.size()
    for name, tensor in sharded.items():
        parts = []
        for rank, buffer in enumerate(everyones):
            nbytes = _nbytes(tensor, rank, mesh.size())
            rows = buffer[offsets[rank] : offsets[rank] + nbytes].clone().view(tensor.dtype)
            parts.append(rows.view(-1, *tensor.shape[1:]))
            offsets[rank] += nbytes
        result[name] = torch.cat(parts)
    return result


def _rows(count: int, rank: int, size: int) -> tuple[int, int]:
    """First row and number of rows of a rank."""
    chunk = -(-count // size)
    start = min(rank * chunk, count)
    return start, min(chunk, count - start)


def _nbytes(tensor: DTensor, rank: int, size: int) -> int:
    return _rows(tensor.shape[0], rank, size)[1] * math.prod(tensor.shape[1:]) * tensor.element_size()
