"""The cost of sending an adapter to vLLM, and of decoding with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from actors.vllm_engine.config import EngineConfig
from actors.vllm_engine.engine import VLLMEngine
from actors.vllm_engine.weight_updates import BetweenRollouts, InFlight, WeightUpdate
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, pack
from tora.models.load import build_model, read_config
from tora.types import PolicySnapshot, SampleRequest, Sampling

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PROMPT = tuple(range(1, 65))
UPDATES: dict[str, WeightUpdate] = {
    "between_rollouts": BetweenRollouts(2),
    "in_flight": InFlight(recompute_kv=False),
    "in_flight_recompute_kv": InFlight(recompute_kv=True),
}


@dataclass(frozen=True, slots=True)
class SyncRow:
    """Syncs of one kind of adapter into an engine that keeps decoding."""

    update: str
    lora_type: str
    lora_rank: int
    nbytes: int
    syncs: int
    stall_ms: tuple[float, float]
    """Median and 99th percentile of the time that decoding stalled, as measured by the engine."""
    copy_ms: tuple[float, float]
    """The same for copies of as many bytes in memory, alternating with the syncs."""
    install_ms: float
    """Median wall time of an install: reading, hashing, writing and reading back."""
    tokens_per_s: float
    """Decoded during the syncs, over all rows."""


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """Decoding under one kind of adapter."""

    lora_type: str
    lora_rank: int
    batch: int
    tokens_per_s: float
    ratio: float
    """Speed relative to the base model in the same engine: the median over rounds that alternate between the two."""


Row = SyncRow | SpeedRow


def random_snapshot(folder: Path, version: int, rank: int, *, gains: bool) -> PolicySnapshot:
    """An adapter on every linear layer of the decoder that the folder's config.json describes."""
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


def run(
    folder: Path, updates: Sequence[str], *, dtype: str, rank: int, rows: Sequence[int], new_tokens: int, rounds: int
) -> Iterator[Row]:
    """`updates`: keys of `UPDATES`. `rows`: batch sizes to time, with `between_rollouts`; the first is also used for
    syncs. `rounds`: number of syncs; speeds take a twentieth."""
    snapshots = {kind: random_snapshot(folder, 0, rank, gains=kind == "dora") for kind in ("lora", "dora")}
    for name in updates:
        update = UPDATES[name]
        for kind, snapshot in snapshots.items():
            engine = _engine(folder, dtype, rank, update, gains=kind == "dora")
            try:
                yield _syncs(engine, name, kind, rank, snapshot, rows[0], rounds)
                for batch in rows if name == "between_rollouts" else ():
                    yield _speed(engine, kind, rank, snapshot, batch, new_tokens, max(2, rounds // 20))
            finally:
                engine.close()


def _engine(folder: Path, dtype: str, rank: int, update: WeightUpdate, *, gains: bool) -> VLLMEngine:
    config = EngineConfig(
        model_path=str(folder),
        dtype="fp32" if dtype == "fp32" else "bf16",
        max_model_len=1024,
        lora_rank=rank,
        lora_targets=_TARGETS,
        gains=gains,
        seed=0,
        gpu_memory_utilization=0.8,
        kv_cache_gib=1.0,
        enforce_eager=False,
    )
    return VLLMEngine(config, update=update)


def _syncs(
    engine: VLLMEngine, update: str, kind: str, rank: int, snapshot: PolicySnapshot, batch: int, syncs: int
) -> SyncRow:
    source = torch.from_numpy(snapshot.data.copy())
    target = source.clone()  # touch the memory before timing it
    first = 0 if kind == "lora" else 10**5
    engine.install(replace(snapshot, version=first))
    reports, copies = [], []
    start = time.perf_counter()
    with _decoding(engine, batch) as tokens:
        for number in range(syncs):
            reports.append(engine.install(replace(snapshot, version=first + 1 + number)))
            copies.append(_seconds(lambda: target.copy_(source)))
    elapsed = time.perf_counter() - start
    return SyncRow(
        update=update,
        lora_type=kind,
        lora_rank=rank,
        nbytes=snapshot.nbytes,
        syncs=syncs,
        stall_ms=_quantiles([r.stall_seconds for r in reports]),
        copy_ms=_quantiles(copies),
        install_ms=1000 * float(np.median([r.seconds for r in reports])),
        tokens_per_s=sum(tokens) / elapsed,
    )


@contextmanager
def _decoding(engine: VLLMEngine, batch: int) -> Iterator[list[int]]:
    """Keeps the engine busy. Yields the token counts of its finished requests."""
    stop, tokens = threading.Event(), list[int]()

    def work() -> None:
        seed = 0
        while not stop.is_set():
            seed += 1
            (group,) = engine.generate([SampleRequest(_PROMPT, batch, seed, Sampling(32))])
            tokens.append(sum(len(c.token_ids) for c in group))

    thread = threading.Thread(target=work)
    thread.start()
    yield tokens
    stop.set()
    thread.join()


def _speed(
    engine: VLLMEngine, kind: str, rank: int, snapshot: PolicySnapshot, batch: int, new_tokens: int, rounds: int
) -> SpeedRow:
    engine.install(replace(snapshot, version=10**6 + (kind == "dora")))
    request = SampleRequest(_PROMPT, batch, 0, Sampling(new_tokens))

    def speed(adapter: bool) -> float:
        return batch * new_tokens / _seconds(lambda: engine.generate([request], adapter=adapter))

    pairs = [(speed(False), speed(True)) for _ in range(rounds + 1)][1:]  # the first round fills caches
    ratio = float(np.median([with_ / without for without, with_ in pairs]))
    return SpeedRow(kind, rank, batch, float(np.median([with_ for _, with_ in pairs])), ratio)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Milliseconds."""
    median, high = 1000 * np.quantile(seconds, [0.5, 0.99])
    return float(median), float(high)


def describe(row: Row) -> str:
    name = f"{row.lora_type} rank {row.lora_rank}"
    if isinstance(row, SpeedRow):
        return f"{name}, batch {row.batch}: {row.tokens_per_s:,.0f} tokens/s, {row.ratio:.2f} of the base's"
    return (
        f"{row.update}, {name}: {row.nbytes:,} bytes, {row.syncs} syncs: stall {row.stall_ms[0]:.1f} ms, p99 "
        f"{row.stall_ms[1]:.1f} (memory copy {row.copy_ms[0]:.1f}, p99 {row.copy_ms[1]:.1f}), "
        f"{row.install_ms:.0f} ms per install, {row.tokens_per_s:,.0f} tokens/s during the syncs"
    )
