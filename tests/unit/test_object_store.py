"""The object store of a private Ray cluster holds what is in flight."""

from __future__ import annotations

from pathlib import Path

import pytest
from learners import config
from tiny import make_text_model

from learner.learner import Learner
from tora.launch.memory import snapshot_bytes
from tora.launch.ray_cluster import object_store_bytes

GIB = 2**30


@pytest.mark.parametrize("lora_type", ["lora", "dora_cache"])
def test_a_snapshot_is_as_large_as_said(tmp_path: Path, lora_type: str) -> None:
    cfg = config(make_text_model(tmp_path), lora_type)
    assert snapshot_bytes(cfg) == Learner(cfg).snapshot().nbytes


@pytest.mark.parametrize(
    ("snapshot", "machine", "expected"),
    [
        (0, 64 * GIB, GIB),
        (GIB, 64 * GIB, 6 * GIB),
        (GIB, None, 6 * GIB),
        (10 * GIB, 64 * GIB, None),  # more than Ray's own share, which is the most
        (None, 64 * GIB, None),
    ],
)
def test_the_store_holds_five_snapshots(snapshot: int | None, machine: int | None, expected: int | None) -> None:
    assert object_store_bytes(snapshot, machine) == expected
