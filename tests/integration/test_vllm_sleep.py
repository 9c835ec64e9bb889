"""vLLM's cache is freed between rollouts, and what it serves afterwards is right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stepped import StepGate
from tiny import make_text_model

pytest.importorskip("vllm")

from peft_reference import TOLERANCE, Reference
from vllm_engines import LONG_PROMPT, PROMPT, request, start_engine

from tora.types import LogprobRequest, SampleRequest


def test_a_sleeping_engine_loses_its_cache_and_serves_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM cannot unmap memory on a CPU: its worker's two calls are recorded here, and the cache is overwritten."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    calls: list[tuple[str, Any]] = []

    def overwrite(name: str, value: float) -> Any:
        def call(worker: Any, tags: Any) -> None:
            calls.append((name, tuple(tags)))
            for cache in worker.model_runner.kv_caches:
                cache.fill_(value)

        return call

    monkeypatch.setattr(CPUWorker, "discard", overwrite("discard", float("nan")))
    monkeypatch.setattr(CPUWorker, "wake_up", overwrite("wake_up", 0.0))
    gate = StepGate()
    folder = make_text_model(tmp_path)
    engine, reference = start_engine(folder, gate=gate, sleeps=True), Reference(folder)

    def check(version: int, *requests: SampleRequest) -> None:
        for asked, group in zip(requests, engine.generate(requests), strict=True):
            assert all(reference.error("dora", version, asked, completion) < TOLERANCE for completion in group)

    engine.install(reference.snapshot(1, "dora", 1))
    check(1, request(LONG_PROMPT))
    engine.sleep()
    engine.sleep()
    assert calls == [("discard", ("kv_cache",))]
    engine.install(reference.snapshot(2, "dora", 2))
    assert len(calls) == 1, "an adapter's slot is no part of the cache"
    check(2, request(LONG_PROMPT), request())
    assert calls[1:] == [("wake_up", ("kv_cache",))]
    with ThreadPoolExecutor(2) as pool:
        with gate.shut():
            running = pool.submit(check, 2, request())
            gate.wait_for_engine()
            sleeping = pool.submit(engine.sleep)
            gate.allow(1)
            assert len(calls) == 2 and not sleeping.done()
        running.result()
        sleeping.result()
    assert calls[2:] == [("discard", ("kv_cache",))]
    asked = [LogprobRequest(PROMPT, PROMPT)]
    assert np.isfinite(engine.logprobs(asked, adapter=False)[0]).all(), "scoring wakes it too"
    engine.sleep()
    engine.close()
