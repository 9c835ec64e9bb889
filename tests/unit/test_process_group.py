"""The process group of ranks on GPUs: each binds its own GPU before any collective."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tora.distributed.process_group import World, group_options, join


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
