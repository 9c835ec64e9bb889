"""A function on several ranks, each a fresh process."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tora.distributed.process_group import end_rank, leave

RANKS = 2


def on_ranks(monkeypatch: pytest.MonkeyPatch, function: Any, *args: Any) -> None:
    """`function(*args)` in fresh processes that see torchrun's variables."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    with monkeypatch.context() as patch:
        for name, value in {**variables, "GLOO_SOCKET_IFNAME": "lo", "PYTHONFAULTHANDLER": "1"}.items():
            patch.setenv(name, value)
        mp.spawn(_rank, (function, args), nprocs=RANKS)


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 2e-5) -> None:
    """Tensors by name, to rounding: bfloat16 ones to one unit in the last place, which is where a tie may fall."""
    assert a.keys() == b.keys()
    for name in a:
        rtol = 2**-7 if a[name].dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, function: Any, args: Any) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    function(*args)
    leave()
    end_rank(0)
