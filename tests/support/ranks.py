"""Runs a function on two ranks, each in a new process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_ports

from tora.distributed.process_group import end_rank, leave

RANKS = 2


def on_ranks(monkeypatch: pytest.MonkeyPatch, function: Any, *args: Any) -> None:
    """Calls `function(*args)` in `RANKS` new processes with torchrun's environment variables."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(RANKS)}
    with monkeypatch.context() as patch:
        for name, value in {**variables, "GLOO_SOCKET_IFNAME": "lo", "PYTHONFAULTHANDLER": "1"}.items():
            patch.setenv(name, value)
        mp.spawn(_rank, (function, args), nprocs=RANKS)


def _rank(rank: int, function: Any, args: Any) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    function(*args)
    leave()
    end_rank(0)
