"""What an adapter costs on its way into vLLM, and what it costs there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.engine import VLLMEngine
from actors.weight_updates import BetweenRollouts
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, pack
from tora.models.load import build_model, read_config
from tora.types import PolicySnapshot, SampleRequest, Sampling

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class SyncRow:
    """One kind of adapter in one engine."""

    lora_type: str
    lora_rank: int
    nbytes: int
    load_ms: float
    """Median, from the call to the answer, nothing else running."""
    load_ms_busy: float
    """Median while the engine decodes: what a request that generates is held up by."""
    copy_ms: float
    """Median of copying as many bytes in memory."""
    tokens_per_s: float
    """Under the adapter, all rows together."""


def random_snapshot(folder: Path, version: int, rank: int, *, gains: bool) -> PolicySnapshot:
    """On every linear layer of the decoder that the folder's config.json describes."""
    config = read_config(folder)
    with torch.device("meta"):
        model = build_model(config)
    generator = torch.Generator().manual_seed(version)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("layers."):
            hf = model.names.module_to_hf(name)
            tensors[hf + LORA_A] = torch.randn(rank, module.in_features, generator=generator)
            tensors[hf + LORA_B] = 0.01 * torch.randn(module.out_features, rank, generator=generator)
            if gains:
                tensors[hf + GAIN] = 1 + 0.1 * torch.randn(module.out_features, generator=generator)
    return pack(version, tensors)


def run(folder: Path, *, dtype: str, rank: int, rows: int, new_tokens: int, rounds: int) -> list[SyncRow]:
    engine = VLLMEngine(
        str(folder),
        dtype="fp32" if dtype == "fp32" else "bf16",
        max_model_len=1024,
        lora_rank=rank,
        lora_targets=_TARGETS,
        update=BetweenRollouts(2),
        seed=0,
        gpu_memory_utilization=0.8,
        kv_cache_gib=0.5,
        enforce_eager=False,
    )
    try:
        return [_measure(engine, folder, kind, rank, rows, new_tokens, rounds) for kind in ("lora", "dora")]
    finally:
        engine.close()


def _measure(
    engine: VLLMEngine, folder: Path, kind: str, rank: int, rows: int, new_tokens: int, rounds: int
) -> SyncRow:
    snapshots = [random_snapshot(folder, v, rank, gains=kind == "dora") for v in range(2 * rounds + 1)]
    engine.load_snapshot(snapshots.pop())
    idle = [_milliseconds(lambda s=s: engine.load_snapshot(s)) for s in snapshots[:rounds]]
    request = SampleRequest(tuple(range(1, 65)), rows, 0, Sampling(new_tokens))
    speeds, busy = [], []
    for snapshot in snapshots[rounds:]:
        start = time.perf_counter()
        (completions,) = engine.generate([request])
        speeds.append(sum(len(c.token_ids) for c in completions) / (time.perf_counter() - start))
        busy.append(_load_while_generating(engine, request, snapshot))
    source = torch.from_numpy(snapshots[0].data.copy())
    copies = [_milliseconds(source.clone) for _ in range(rounds)]
    medians = (statistics.median(values) for values in (idle, busy, copies, speeds))
    return SyncRow(kind, rank, snapshots[0].nbytes, *medians)


def _load_while_generating(engine: VLLMEngine, request: SampleRequest, snapshot: PolicySnapshot) -> float:
    from threading import Thread

    generating = Thread(target=engine.generate, args=([request],))
    generating.start()
    time.sleep(0.05)  # for the request to be running
    taken = _milliseconds(lambda: engine.load_snapshot(snapshot))
    generating.join()
    return taken


def _milliseconds(work: object) -> float:
    assert callable(work)
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def describe(rows: Sequence[SyncRow]) -> list[str]:
    return [
        f"{r.lora_type} rank {r.lora_rank}: {r.nbytes:,} bytes, {r.load_ms:.1f} ms idle, {r.load_ms_busy:.1f} ms while "
        f"generating, {r.copy_ms:.2f} ms to copy, {r.tokens_per_s:,.0f} tokens/s"
        for r in rows
    ]
