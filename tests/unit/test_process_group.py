"""The process group of ranks on GPUs: each binds its own GPU before any collective."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest
import torch
from ranks import RankProcesses

from tora.distributed.process_group import STORE_KEY, World, gather_objects, group_options, join


def test_a_rank_on_a_gpu_binds_nccl_to_it() -> None:
    gpu = torch.device("cuda", 3)
    assert group_options(gpu) == {"backend": "cpu:gloo,cuda:nccl", "device_id": gpu}
    assert group_options(torch.device("cpu")) == {"backend": "gloo"}


@pytest.mark.parametrize("size", [1, 4])
def test_the_gpu_is_current_before_the_group_starts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("torch.cuda.set_device", lambda device: calls.append(device))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **options: calls.append(options))
    gpu = torch.device("cuda", 1)
    join(World(1, size, 1) if size > 1 else World(), gpu)
    assert calls == ([gpu, group_options(gpu)] if size > 1 else [gpu])


def test_a_cpu_rank_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.set_device", lambda device: pytest.fail("no GPU here"))
    join(World(), torch.device("cpu"))


def listens_only_here() -> None:
    """On a rank that Tora starts: its listeners and, on rank 0, that another key sees nothing of the group's."""
    os.environ[STORE_KEY] = "secret"
    try:
        join(World.from_environment(), torch.device("cpu"))
        assert gather_objects(os.environ["RANK"]) == ["0", "1"]
        listeners = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert set(listeners) == {"127.0.0.1"} or (not listeners and os.environ["RANK"] == "1"), listeners
    finally:
        del os.environ[STORE_KEY]


def test_ranks_that_tora_starts_listen_on_one_address() -> None:
    ranks = RankProcesses()
    try:
        ranks(listens_only_here)
    finally:
        ranks.close()
