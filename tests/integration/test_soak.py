"""A thousand syncs: memory stays flat, and the last sync is as exact as the first."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from tiny import make_text_model

pytest.importorskip("vllm")

from canaries import Run
from vllm_engines import LONG_PROMPT, request, start_engine

from actors.vllm_engine.weight_updates import BetweenRollouts, InFlight


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("update", ["between_rollouts", "in_flight"])
def test_a_thousand_syncs_keep_memory_flat_and_pass_the_canary(tmp_path: Path, update: str) -> None:
    """Learner and engine share this process; rollouts run between syncs, and the canary checks every tenth sync."""
    folder = make_text_model(tmp_path)
    run = Run(folder, "dora_cache")
    made = InFlight(recompute_kv=True) if update == "in_flight" else BetweenRollouts(2)
    worker = run.serve(partial(start_engine, folder, update=made))
    memory = []
    try:
        for number in range(1000):
            run.change(1e-3)
            if number % 10 == 0:
                run.sync()
                assert run.metrics["canary/gap_max"] < 1e-4
            else:
                worker.forward(run.learner.snapshot())
            worker._engine.generate([request(LONG_PROMPT, seed=number, max_tokens=4)])
            memory.append(resident_bytes())
        assert run.metrics["canary/effect"] > 0.1
    finally:
        worker.close()
    assert max(memory[100:]) < 1.02 * memory[100], f"grew from {memory[100]:,} to {max(memory[100:]):,} bytes"
