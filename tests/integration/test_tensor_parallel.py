"""One engine with its weights split over two vLLM processes, against PEFT in float32."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny import make_text_model

pytest.importorskip("vllm")

from peft_reference import TOLERANCE, Reference
from vllm_engines import PROMPT, request, start_engine

from actors.vllm_engine.slot_contents import Refusal, SlotContents, consensus
from tora.errors import SyncError


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_two_ranks_serve_the_policy_that_was_sent(tmp_path: Path, family: str) -> None:
    before = _shared()
    folder = make_text_model(tmp_path / "model", family, tied=family == "qwen3")
    reference, engine = Reference(folder), start_engine(folder, tensor_parallel=2)
    try:
        workers = [p for p in psutil.Process().children(recursive=True) if "VLLM" in " ".join(p.cmdline())]
        for version, (kind, seed) in enumerate([("lora", 1), ("dora", 2), ("dora", 1)]):
            sent = reference.snapshot(version, kind, seed)
            report = engine.install(sent)
            assert (report.version, report.sha256) == (version, sent.sha256), "both ranks hold every tensor's part"
            asked = request(num_samples=2)
            for completion in engine.generate([asked])[0]:
                assert reference.error(kind, seed, asked, completion) < TOLERANCE
        damaged = sent.data.copy()
        damaged[100] ^= 1
        with pytest.raises(SyncError, match="damaged"):
            engine.install(replace(sent, version=9, data=damaged))
        assert np.isfinite(engine.generate([request(PROMPT)])[0][0].logprobs).all(), "the engine keeps running"
    finally:
        engine.close()
    assert not [p for p in workers if p.is_running()]
    assert not _shared() - before


def _shared() -> set[str]:
    """Names of files and shared memory that vLLM's processes share."""
    names = {*os.listdir("/dev/shm"), *os.listdir(tempfile.gettempdir())}
    return {name for name in names if name.startswith(("psm_", "vllm_"))}


def test_ranks_that_differ_are_an_error() -> None:
    held = SlotContents("abc", "float32", 7)
    assert consensus([held, held]) == held
    with pytest.raises(SyncError, match="different policies"):
        consensus([held, replace(held, sha256="abd")])
    with pytest.raises(SyncError, match="no place"):
        consensus([held, Refusal("no place")])
