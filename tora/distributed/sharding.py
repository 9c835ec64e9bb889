"""The same functions for tensors sharded by row over ranks (DTensor) and for plain tensors.

FSDP2 gives rank r of n the rows [r·c, (r+1)·c) of every parameter, with c = ceil(rows / n); the last ranks may hold
fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All rows, on every rank. Collective, once per call; for many tensors use `gather`."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of `full` that this rank holds of `like`, which has as many rows."""
    if not isinstance(like, DTensor):
        return full
    start, count = _rows(full.shape[0], like.device_mesh.get_local_rank(), like.device_mesh.size())
    return full[start : start + count]


def from_local_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor with as many rows as `like`, sharded like it, from this rank's rows. The inverse of `local_rows`."""
    if not isinstance(like, DTensor):
        return rows
    shape = (like.shape[0], *rows.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, like.device_mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


@torch.no_grad()
def copy_full(target: torch.Tensor, full: torch.Tensor) -> None:
    """Copy `full`, which every rank has, into `target`, which may be sharded."""
    local(target).copy_(local_rows(full, target))


@torch.no_grad()
def gather(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The full tensors, detached, on every rank, by a single collective. Every rank must pass the same names."""
    result = {name: t.detach() for name, t in tensors.items()}
    sharded = {name: t for name, t in result.items() if isinstance(t, DTensor)}
    if not sharded:
        return result
    mesh = next(iter(sharded.values())).device_mesh
    own = torch.cat([t.to_local().contiguous().reshape(-1).view(torch.uint8) for t in sharded.values()])
    sizes = [sum(_nbytes(t, rank, mesh.size()) for t in sharded.values()) for rank in range(mesh.size())]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=own.device)
    padded[: len(own)] = own
    buffers = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(buffers, padded, group=mesh.get_group())
    offsets = [0] * mesh.size()
    for name, tensor in sharded.items():
        parts = []
        for rank, buffer in enumerate(buffers):
            nbytes = _nbytes(tensor, rank, mesh.size())
            rows = buffer[offsets[rank] : offsets[rank] + nbytes].clone().view(tensor.dtype)
            parts.append(rows.view(-1, *tensor.shape[1:]))
            offsets[rank] += nbytes
        result[name] = torch.cat(parts)
    return result


def _rows(count: int, rank: int, size: int) -> tuple[int, int]:
    """A rank's first row and number of rows."""
    chunk = -(-count // size)
    start = min(rank * chunk, count)
    return start, min(chunk, count - start)


def _nbytes(tensor: DTensor, rank: int, size: int) -> int:
    return _rows(tensor.shape[0], rank, size)[1] * math.prod(tensor.shape[1:]) * tensor.element_size()
