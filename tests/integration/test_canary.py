"""Deliberately broken syncs with a real learner and real vLLM. The digest or the canary catches each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from canaries import PROBES, Run, Workers
from tiny import LINEARS, make_text_model

from actors.torch_engine.engine import TorchEngine
from tora.adapters.snapshot import LORA_B
from tora.errors import SyncError
from tora.run.canary import Canary, ProbeLogprobs, find_disagreement
from tora.types import LogprobRequest

pytest.importorskip("vllm")

from vllm_engines import start_engine

from actors.vllm_engine import adapter_slots
from actors.vllm_engine.weight_updates import BetweenRollouts

REQUESTS = [LogprobRequest(probe.token_ids[:20], probe.token_ids[20:]) for probe in PROBES]


def score(effect: float, noise: float, *, off_noise: float | None = None) -> tuple[ProbeLogprobs, ProbeLogprobs]:
    """A learner's log-probs, and an engine's that differ from them by `noise`."""
    rng = np.random.default_rng(0)
    off = rng.normal(-3, 1, 500)
    on = off + rng.normal(0, effect, 500)
    off_noise = noise if off_noise is None else off_noise
    return ProbeLogprobs(on, off), ProbeLogprobs(on + rng.normal(0, noise, 500), off + rng.normal(0, off_noise, 500))


@pytest.mark.parametrize(("effect", "noise", "max_gap"), [(0, 0, 1e-4), (0.3, 1e-6, 1e-4), (3e-3, 3e-2, 0.1)])
def test_numerical_noise_alone_passes(effect: float, noise: float, max_gap: float) -> None:
    assert find_disagreement(*score(effect, noise), max_gap) is None


def test_each_kind_of_breakage_has_its_own_message() -> None:
    good = score(0.1, 1e-6)[0]
    assert good.off_N is not None
    assert "moves the learner's" in str(find_disagreement(*score(0.3, 0.3, off_noise=1e-6), 1.0)), "far below the bound"
    assert "are the base's" in str(find_disagreement(good, ProbeLogprobs(good.off_N, good.off_N), 1e-4))
    assert "bases are not the same" in str(find_disagreement(*score(1e-3, 1e-2), 1e-4))
    assert "more than" in str(
        find_disagreement(ProbeLogprobs(good.on_N, None), ProbeLogprobs(good.on_N + 1, None), 1e-4)
    )


def test_a_scaling_that_is_off_by_a_tenth_is_found() -> None:
    learner, engine = score(0.3, 1e-6)
    assert learner.off_N is not None
    wrong = ProbeLogprobs(learner.off_N + 1.1 * (learner.on_N - learner.off_N), engine.off_N)
    assert "applied in part, wrongly" in str(find_disagreement(learner, wrong, 0.1))


@pytest.fixture(scope="module", params=["lora", "dora_cache"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = make_text_model(tmp_path_factory.mktemp("model"))
    run = Run(folder, request.param)
    run.serve(partial(start_engine, folder, update=BetweenRollouts(2)))
    yield run
    run.worker.close()


def test_a_good_sync_passes(run: Run) -> None:
    for _ in range(3):
        run.change(0.02)
        report = run.sync()
        assert report.sha256 == run.learner.snapshot().sha256
        assert report.num_modules == 2 * len(LINEARS)
        assert run.metrics["canary/gap_max"] < 1e-4
        assert run.metrics["canary/effect"] > 0.1


def poisoned_and_healed(run: Run) -> None:
    """One weight of nan: no rollout can be used, the canary stops the run, and nothing of it stays in the engine."""
    before = run.worker.logprobs(REQUESTS, adapter=False)
    first = next(iter(run.learner._parameters.values()))
    sound = first.detach().clone()
    with torch.no_grad():
        first[0] = torch.nan
    run.change(0.0)
    with pytest.raises(SyncError, match="by nan"):
        run.sync()
    (result,) = run.worker.run_groups(PROBES[:1])
    assert result.rollouts == () and len(result.bad_logprobs) == 2
    assert result.bad_logprobs[0].version == run.learner.version
    with torch.no_grad():
        first.copy_(sound)
    run.change(0.0)
    run.sync()
    assert run.metrics["canary/gap_max"] < 1e-4
    for a, b in zip(before, run.worker.logprobs(REQUESTS, adapter=False), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def drop(placed: adapter_slots.Placed) -> adapter_slots.Placed:
    (name, first), *_ = placed.items()
    part, *others = first.parts
    return {**placed, name: replace(first, parts=({**part, LORA_B: torch.zeros_like(part[LORA_B])}, *others))}


def scale(placed: adapter_slots.Placed) -> adapter_slots.Placed:
    """Scales B by alpha / rank a second time: the snapshot's B already contains it."""
    return {
        name: replace(layer, parts=tuple({**part, LORA_B: 8 * part[LORA_B]} for part in layer.parts))
        for name, layer in placed.items()
    }


@pytest.mark.parametrize("change", [drop, scale])
def test_the_digest_catches_wrongly_written_tensors(
    run: Run, change: Callable[[adapter_slots.Placed], adapter_slots.Placed], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = adapter_slots.write
    monkeypatch.setattr(adapter_slots, "write", lambda manager, slot, placed: write(manager, slot, change(placed)))
    run.change(0.02)
    with pytest.raises(SyncError, match="applied in part"):
        run.sync()


def test_the_digest_catches_leftover_tensors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot has fewer modules than the slot's previous one, and the slot is not reset."""
    write = adapter_slots.write

    def without_reset(manager: Any, slot: int, placed: adapter_slots.Placed) -> None:
        kept = {n: m for n, m in manager.modules.items() if n in placed}
        write(type("Manager", (), {"modules": kept}), slot, placed)

    run.change(0.02)
    run.sync()
    monkeypatch.setattr(adapter_slots, "write", without_reset)
    for _ in range(2):
        run.change(0.02)
    snapshot = run.learner.snapshot()
    from tora.adapters.snapshot import pack, unpack

    fewer = {n: t for n, t in unpack(snapshot).items() if "down_proj" not in n}
    with pytest.raises(SyncError, match="down_proj is adapted"):
        run.worker.forward(pack(snapshot.version, fewer))


def test_the_canary_catches_a_swapped_module(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """k and v have the same shape, so each tensor fits the wrong place and reads back as sent."""
    find_places = adapter_slots.find_places
    swap = {"k_proj": "v_proj", "v_proj": "k_proj"}

    def swapped(manager: Any, modules: Iterable[str]) -> dict[str, adapter_slots.Place]:
        found = find_places(manager, modules)
        layer0 = "layers.0."
        return {n: found[n[:-6] + swap[n[-6:]]] if layer0 in n and n[-6:] in swap else p for n, p in found.items()}

    monkeypatch.setattr(adapter_slots, "find_places", swapped)
    run.change(0.02)
    with pytest.raises(SyncError, match="applied in part, wrongly, or to another slot"):
        run.sync()


def test_the_canary_catches_a_learner_that_sends_the_wrong_scaling(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tora.adapters.lora import LoRALinear

    wire = LoRALinear.to_wire
    monkeypatch.setattr(
        LoRALinear, "to_wire", lambda self, adapter, norm: {**wire(self, adapter, norm), LORA_B: adapter["lora_b"]}
    )
    run.change(0.02)
    with pytest.raises(SyncError, match="applied in part, wrongly"):
        run.sync()


def test_the_canary_catches_a_stale_slot(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    slot_of = adapter_slots.slot_of
    monkeypatch.setattr(adapter_slots, "slot_of", lambda manager, adapter_id: 1 - slot_of(manager, adapter_id))
    run.change(0.1)
    with pytest.raises(SyncError, match="canary"):
        run.sync()


def test_the_canary_catches_an_adapter_that_is_not_applied(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.vllm_engine.cpu_lora import GroupedLoRA
    from actors.vllm_engine.dora_layers import GainLayer

    monkeypatch.setattr(GroupedLoRA, "add_lora_linear", lambda *args, **kwargs: None)
    monkeypatch.setattr(GainLayer, "scale", lambda self, output: output)
    run.change(0.02)
    with pytest.raises(SyncError, match="are the base's in the engine"):
        run.sync()


def test_in_bf16_the_digest_covers_rounded_tensors_and_the_canary_passes(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, dtype=torch.bfloat16)
    run = Run(folder, "dora", "bf16")
    worker = run.serve(partial(start_engine, folder, dtype="bf16"))
    try:
        for _ in range(2):
            run.change(0.02)
            assert run.sync().dtype == "bfloat16"
        assert 0 < run.metrics["canary/gap_mean"] < 0.1
    finally:
        worker.close()


@pytest.mark.parametrize("shared", [True, False])
def test_the_torch_engine(tmp_path: Path, shared: bool) -> None:
    folder = make_text_model(tmp_path)
    run, other = Run(folder, "dora"), Run(folder, "dora")
    model = (run if shared else other).learner.model
    run.serve(lambda: TorchEngine(model, device=torch.device("cpu"), shared=shared, max_rows=8))
    run.sync()
    assert run.metrics["canary/gap_max"] < 1e-4 and run.metrics["canary/effect"] > 0.1
    poisoned_and_healed(run)
    run.change(0.1)
    canary = Canary(PROBES, every=1, max_gap=1e-4, has_adapter=True)
    if not shared:
        with pytest.raises(SyncError, match="does not serve policy version 4"):
            canary.check(run.learner.version, run.learner, Workers(run.worker))


def test_only_tokens_after_the_images_are_scored() -> None:
    image, text = 5, tuple(range(10, 16))
    prompts = [replace(PROBES[0], token_ids=ids) for ids in ((1, *[image] * 40, *text), (1, *[image] * 4, *text * 10))]
    canary = Canary(prompts, every=1, max_gap=1e-4, has_adapter=True, image_token=image)
    assert [len(r.completion) for r in canary._requests] == [6, 32]
    assert all(image not in r.completion for r in canary._requests)
