"""A sync on a GPU: exact, on a stream of its own, and without waiting for the steps that are queued."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from peft_reference import Reference
from tiny import make_text_model
from vllm_engines import request, start_engine

pytest.importorskip("vllm")

import vllm_layers
from vllm_layers import SIZES, adapter

from actors.vllm_engine import adapter_slots
from actors.vllm_engine.streams import CudaStreams
from tora.adapters.snapshot import digest, engine_digest, pack, split_by_module


def busy(milliseconds: int) -> torch.cuda.Event:
    """Occupies the current stream; the event that ends it."""
    torch.cuda._sleep(milliseconds * 1_000_000)  # at least a cycle a nanosecond
    return torch.cuda.current_stream().record_event()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_staging_and_reading_wait_for_no_step(kind: str) -> None:
    """The engine's stream is busy all the while. A write is queued on it without waiting, and takes effect in order."""
    sent = adapter(list(SIZES), 16, 1, gains=list(SIZES) if kind == "dora" else [])
    snapshot, modules = pack(1, sent), split_by_module(sent)
    made = vllm_layers.layers(torch.bfloat16, device="cuda")
    manager, streams = vllm_layers.manager(made), CudaStreams(torch.device("cuda", torch.cuda.current_device()))
    for is_warm in (False, True):  # allocating memory may wait for the GPU
        torch.cuda.synchronize()
        step = busy(500)
        staged = adapter_slots.stage(manager, snapshot, modules, streams)
        assert not is_warm or not step.query(), "staging returned while the step ran"
        start = time.perf_counter()
        streams.wait(staged.ready)
        adapter_slots.write(manager, 1, staged.placed)
        streams.keep(staged.buffer)
        written = streams.record()
        stall = time.perf_counter() - start
        del staged
        assert not is_warm or not (step.query() or written.query())
        held = adapter_slots.read(manager, 1, modules, streams, written)
        assert step.query(), "reading waits for the write, which is behind the step"
        assert not is_warm or stall < 0.02
    flat = {name + s: t for name, parts in held.items() for s, t in parts.items() if name + s in sent}
    assert digest(flat) == engine_digest(snapshot, "bfloat16")


def test_a_staged_buffers_memory_is_not_reused_under_a_write() -> None:
    made = vllm_layers.layers(torch.bfloat16, device="cuda")
    manager, streams = vllm_layers.manager(made), CudaStreams(torch.device("cuda", torch.cuda.current_device()))
    sent = [adapter(list(SIZES), 16, seed) for seed in (1, 2)]
    torch.cuda.synchronize()
    busy(300)
    for slot, tensors in enumerate(sent):  # the second is staged while the first's write is still queued
        staged = adapter_slots.stage(manager, pack(slot, tensors), split_by_module(tensors), streams)
        streams.wait(staged.ready)
        adapter_slots.write(manager, slot, staged.placed)
        streams.keep(staged.buffer)
        del staged
    written = streams.record()
    for slot, tensors in enumerate(sent):
        held = adapter_slots.read(manager, slot, split_by_module(tensors), streams, written)
        flat = {name + s: t for name, parts in held.items() for s, t in parts.items() if name + s in tensors}
        assert digest(flat) == engine_digest(pack(slot, tensors), "bfloat16")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_engines_syncs_are_short(tmp_path: Path, kind: str) -> None:
    folder = make_text_model(tmp_path, dtype=torch.bfloat16)
    reference = Reference(folder)
    engine = start_engine(folder, dtype="bf16", enforce_eager=False, gains=kind == "dora")
    try:
        for version in range(6):
            snapshot = reference.snapshot(version, kind, version % 2)
            report = engine.install(snapshot)
            assert report.sha256 == engine_digest(snapshot, "bfloat16")
            engine.generate([request(num_samples=2)])
        assert report.stall_seconds < 0.02 and report.seconds < 0.4
    finally:
        engine.close()
