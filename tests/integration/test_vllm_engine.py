"""vLLM against teacher-forced PEFT in float32, on tiny random models. All tests share one engine per family."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stepped import StepGate
from tiny import LINEARS, make_text_model

pytest.importorskip("vllm")

from peft_reference import RANK, TOLERANCE, Reference, Tensors
from vllm_engines import LONG_PROMPT, PROMPT, request, start_engine, wait_until

from actors.abort import Aborted, abortable
from actors.vllm_engine.engine import VLLMEngine
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, pack
from tora.errors import RolloutError, SyncError
from tora.types import Completion, SampleRequest, Sampling


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = make_text_model(tmp_path_factory.mktemp(request.param), request.param, tied=request.param == "qwen3")
    gate = StepGate()
    engine = start_engine(folder, gate=gate, pins=True)
    with pytest.raises(RolloutError, match="first snapshot"):
        engine.generate([SampleRequest(PROMPT, 1, 0, Sampling(4))])
    yield Served(engine, Reference(folder), gate)
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        engine.generate([SampleRequest(PROMPT, 1, 0, Sampling(4))])


class Served:
    """An engine, its reference and an increasing version number."""

    def __init__(self, engine: VLLMEngine, reference: Reference, gate: StepGate) -> None:
        self.engine, self.reference, self.gate, self.version = engine, reference, gate, 0

    def install(self, kind: str, seed: int) -> int:
        self.version += 1
        report = self.engine.install(self.reference.snapshot(self.version, kind, seed))
        assert report.version == self.version
        return self.version

    def check(self, kind: str, seed: int, *requests: SampleRequest) -> list[list[Completion]]:
        """Generates, and compares every token's log-prob with the reference."""
        groups = self.engine.generate(requests)
        for r, group in zip(requests, groups, strict=True):
            assert len(group) == r.num_samples
            for completion in group:
                assert (completion.versions == self.version).all()
                assert self.reference.error(kind, seed, r, completion) < TOLERANCE
        return groups


@pytest.mark.parametrize("kind", ["lora", "dora", "patterns"])
def test_successive_syncs_serve_the_policy_that_was_sent(served: Served, kind: str) -> None:
    for seed in (1, 2):
        served.install(kind, seed)
        served.check(kind, seed, request(), request(LONG_PROMPT))
    apart = request(num_samples=1)
    (completion,) = served.check(kind, 2, apart)[0]
    assert served.reference.error(kind, 1, apart, completion) > 0.1, "the two adapters differ visibly"


def test_a_pinned_version_outlives_the_ring_of_slots(served: Served) -> None:
    pinned = served.install("dora", 3)
    served.engine.pin(served.reference.snapshot(pinned, "dora", 3))
    asked = replace(request(LONG_PROMPT), pinned=True)
    for seed in (1, 2, 1):  # more than there are slots
        served.install("lora", seed)
        served.check("lora", seed, request(LONG_PROMPT))
        for completion in served.engine.generate([asked])[0]:
            assert (completion.versions == pinned).all()
            assert served.reference.error("dora", 3, asked, completion) < TOLERANCE


def test_the_report_counts_and_hashes_what_arrived(served: Served) -> None:
    served.version += 1
    snapshot = served.reference.snapshot(served.version, "dora", 1)
    report = served.engine.install(snapshot)
    assert (report.nbytes, report.sha256, report.num_modules) == (snapshot.nbytes, snapshot.sha256, 2 * len(LINEARS))
    again = served.engine.install(snapshot)
    assert replace(again, seconds=0, stall_seconds=0) == replace(report, seconds=0, stall_seconds=0), "idempotent"


def test_modules_absent_from_a_snapshot_run_as_the_base(served: Served) -> None:
    served.install("dora", 1)
    served.install("dora", 2)
    served.version += 1  # goes into the first version's slot
    name = "model.layers.1.mlp.down_proj"
    zero = {name + LORA_A: torch.zeros(RANK, 256), name + LORA_B: torch.zeros(128, RANK)}
    assert served.engine.install(pack(served.version, zero)).num_modules == 1
    served.check("base", 0, request())


def test_truncated_sampling_reports_the_policy_and_the_truncated_distribution(served: Served) -> None:
    served.install("dora", 1)
    cold = request(temperature=0.7, top_p=0.8, num_samples=4)
    served.check("dora", 1, cold, request(temperature=1.3, top_k=5))
    (completion, *_) = served.engine.generate([cold])[0]
    assert (completion.sampling_logprobs > completion.logprobs + 0.01).any()


def test_greedy_is_finite_and_repeats_one_completion(served: Served) -> None:
    served.install("lora", 1)
    greedy = request(temperature=0.0, num_samples=3)
    first, *others = served.check("lora", 1, greedy, request())[0]
    assert np.isfinite(first.logprobs).all()
    assert all((first.token_ids == other.token_ids).all() for other in others)


def test_same_seed_same_tokens(served: Served) -> None:
    served.install("lora", 1)
    one, two = (served.engine.generate([request(seed=s), request(LONG_PROMPT, seed=9)])[0] for s in (5, 5))
    (other,) = served.engine.generate([request(seed=6)])
    tokens = [tuple(c.token_ids) for c in one]
    assert tokens == [tuple(c.token_ids) for c in two]
    assert len({*tokens, *(tuple(c.token_ids) for c in other)}) == 4, "neighbouring seeds share no samples"


def test_a_stop_token_ends_a_completion_and_is_part_of_it(served: Served) -> None:
    served.install("lora", 1)
    ((free,),) = served.check("lora", 1, request(num_samples=1))
    stop = int(free.token_ids[4])
    first = free.token_ids.tolist().index(stop)
    ((stopped,),) = served.check("lora", 1, request(num_samples=1, stop_token_ids=(stop,)))
    assert stopped.token_ids.tolist() == free.token_ids.tolist()[: first + 1]
    assert stopped.stopped and not free.stopped


def test_prefix_cache_is_not_shared_between_versions(served: Served) -> None:
    for kind, seed in (("lora", 1), ("lora", 2), ("dora", 1)):
        served.install(kind, seed)
        for _ in range(2):  # cold, then from the cache
            served.check(kind, seed, request(LONG_PROMPT))


def test_a_repeated_version_number_serves_its_own_weights(served: Served) -> None:
    served.install("lora", 1)
    served.check("lora", 1, request(LONG_PROMPT))
    served.version -= 1
    served.install("lora", 2)
    served.check("lora", 2, request(LONG_PROMPT))


def test_versions_in_one_batch_do_not_affect_each_other(served: Served) -> None:
    """An install waits for the last request in its slot and holds up later commands. Running requests continue."""
    engine, reference, gate = served.engine, served.reference, served.gate
    versions = [served.version + i for i in (1, 2, 3)]  # the third shares the first one's slot
    policies = [("lora", 1), ("dora", 2), ("dora", 3)]
    asked = [request(max_tokens=120, num_samples=3), request(max_tokens=20), request(max_tokens=20)]
    snapshots = [reference.snapshot(v, *policy) for v, policy in zip(versions, policies, strict=True)]
    served.version = versions[-1]
    engine.install(snapshots[0])
    with ThreadPoolExecutor(5) as threads, gate.shut():
        generations = [threads.submit(engine.generate, [asked[0]])]
        gate.wait_for_engine()
        installs = []
        for i in (1, 2):  # the engine is held before a step, so commands queue up in this order
            installs.append(threads.submit(engine.install, snapshots[i]))
            wait_until(lambda i=i: len(engine._commands) == 2 * i - 1)
            generations.append(threads.submit(engine.generate, [asked[i]]))
            wait_until(lambda i=i: len(engine._commands) == 2 * i)
        gate.allow(1)
        installs[0].result(30)
        gate.open()
        installs[1].result(30)
        assert generations[0].done(), "the third version overwrote the slot of unfinished requests"
        groups = [generation.result(30)[0] for generation in generations]
    for version, policy, one, group in zip(versions, policies, asked, groups, strict=True):
        for completion in group:
            assert (completion.versions == version).all()
            assert reference.error(*policy, one, completion) < TOLERANCE


def test_rows_without_adapter_are_the_base(served: Served) -> None:
    """Runs a mixed batch directly on vLLM, while the engine's thread is idle."""
    from vllm.inputs import tokens_input

    from actors.vllm_engine.requests import completion, sampling_params

    served.install("lora", 1)
    served.install("dora", 2)
    llm, asked = served.engine._llm, request(num_samples=1, max_tokens=30)
    zeros = np.zeros(30, np.int64)
    ring = [p.lora for p in served.engine._policies.values() if p.lora and "pinned" not in p.lora.lora_name]
    policies = {lora.lora_name: lora for lora in ring}

    def run(names: list[str]) -> dict[str, Completion]:
        for name in names:
            prompt = tokens_input(list(asked.token_ids))
            llm.add_request(name, prompt, sampling_params(asked), lora_request=policies.get(name))
        outputs = {}
        while llm.has_unfinished_requests():
            outputs |= {o.request_id: completion(o.outputs[0], zeros) for o in llm.step()}
        return outputs

    alone, mixed = run(["base"]), run(["base", *policies])
    assert (alone["base"].token_ids == mixed["base"].token_ids).all()
    for outputs in (alone, mixed):
        assert served.reference.error("base", 0, asked, outputs["base"]) < TOLERANCE
    (lora, dora) = sorted(policies, key=lambda name: policies[name].lora_path)
    assert served.reference.error("lora", 1, asked, mixed[lora]) < TOLERANCE
    assert served.reference.error("dora", 2, asked, mixed[dora]) < TOLERANCE


def _without(tensors: Tensors, suffix: str) -> Tensors:
    dropped = next(name for name in tensors if name.endswith(suffix))
    return {name: t for name, t in tensors.items() if name != dropped}


def _resized(tensors: Tensors, suffix: str, **size: int) -> Tensors:
    name = next(name for name in tensors if name.endswith(suffix))
    shape = list(tensors[name].shape)
    shape[size["dim"]] = size["to"]
    return {**tensors, name: torch.zeros(shape)}


BROKEN: dict[str, tuple[Any, str]] = {
    "A without B": (lambda t: _without(t, LORA_B), "but no .*lora_B"),
    "B without A": (lambda t: _without(t, LORA_A), "but no .*lora_A"),
    "no such layer": (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, "matches no LoRA layer"),
    "not adapted": (lambda t: {k.replace("mlp.up_proj", "up"): v for k, v in t.items()}, "matches no LoRA layer"),
    "PEFT's prefix": (lambda t: {f"base_model.model.{k}": v for k, v in t.items()}, "matches no LoRA layer"),
    "unknown suffix": (lambda t: {**t, "model.norm.weight": torch.ones(128)}, "model.norm.weight"),
    "rank": (lambda t: {k: v.repeat(3, 1) if k.endswith(LORA_A) else v for k, v in t.items()}, "rank 12, above"),
    "shape of A": (lambda t: _resized(t, LORA_A, dim=1, to=64), "has shape"),
    "shape of B": (lambda t: _resized(t, LORA_B, dim=0, to=7), "has shape"),
    "shape of the gain": (lambda t: _resized(t, GAIN, dim=0, to=7), "has shape"),
    "dtype": (lambda t: {k: v.bfloat16() for k, v in t.items()}, "must be sent in float32"),
    "nothing": (lambda t: {}, "is empty"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_snapshot_is_refused_whole(served: Served, case: str) -> None:
    if case == next(iter(BROKEN)):
        served.install("dora", 1)
    breakage, message = BROKEN[case]
    with pytest.raises(SyncError, match=message):
        served.engine.install(pack(served.version + 1, breakage(served.reference.tensors("dora", 2))))
    if case == list(BROKEN)[-1]:
        served.check("dora", 1, request())


def test_a_damaged_snapshot_is_refused(served: Served) -> None:
    served.install("dora", 1)
    good = served.reference.snapshot(served.version + 1, "dora", 2)
    flipped = good.data.copy()
    flipped[5] ^= 1
    repeated = replace(good, entries=(*good.entries, good.entries[0]))
    for damaged in (replace(good, data=flipped), replace(good, data=good.data[:-64]), repeated):
        with pytest.raises(SyncError):
            served.engine.install(damaged)
    served.check("dora", 1, request())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(max_tokens=250), "262 tokens, more than max_model_len 256"),
        (request(()), "empty"),
        (request((1, 320)), "vocabulary of 320"),
        (request(temperature=0.001), "temperature 0.001"),
        (request(top_p=0.0), "top_p"),
    ],
)
def test_impossible_requests_are_rejected_before_vllm(served: Served, asked: SampleRequest, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        served.engine.generate([asked])


def test_an_error_in_the_engines_thread_reaches_every_caller(tmp_path: Path) -> None:
    before = dict(os.environ)
    folder = make_text_model(tmp_path, num_layers=1)
    gate = StepGate()
    engine = start_engine(folder, gate=gate)
    changed = {name for name, value in os.environ.items() if before.get(name) != value}
    assert all(name.startswith(("VLLM_", "TRITON_F32")) for name in changed), (
        "LD_PRELOAD and the like must not reach child processes"
    )
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee", "kernels may be compiled at any later step"
    reference = Reference(folder)
    engine.install(reference.snapshot(0, "lora", 1))
    with ThreadPoolExecutor(3) as threads, gate.shut():
        waiting = [threads.submit(engine.generate, [request()]) for _ in range(2)]
        gate.wait_for_engine()
        waiting.append(threads.submit(engine.install, reference.snapshot(2, "lora", 2)))
        gate.fail(MemoryError("out of memory in step"))
        for future in waiting:
            with pytest.raises(RolloutError, match="MemoryError: out of memory in step"):
                future.result(30)
    for call in (lambda: engine.generate([request()]), lambda: engine.install(reference.snapshot(1, "lora", 1))):
        with pytest.raises(RolloutError, match="out of memory in step"):
            call()
    engine.close()
    assert dict(os.environ) == before


def test_impossible_arguments_raise_one_sentence(tmp_path: Path) -> None:
    before = dict(os.environ)
    with pytest.raises(ValueError, match="nowhere is not a Hugging Face model folder"):
        start_engine(tmp_path / "nowhere")
    folder = make_text_model(tmp_path, num_layers=1)
    with pytest.raises(ValueError, match="lora_rank 513"):
        start_engine(folder, lora_rank=513)
    with pytest.raises(ValueError, match=r"max_model_len \(100000\) is greater"):
        start_engine(folder, max_model_len=100_000)
    assert dict(os.environ) == before


def test_a_rollout_in_parts_continues_under_the_newest_version(served: Served) -> None:
    from actors.continuation import generate_in_parts

    old, asked = served.install("lora", 1), request(LONG_PROMPT, max_tokens=50, num_samples=3)

    class Syncing:
        """Installs a snapshot between two parts, as if the learner had stepped meanwhile."""

        parts = 0

        def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
            self.parts += 1
            if self.parts == 2:
                served.install("dora", 2)
            return served.engine.generate(requests)

    engine = Syncing()
    (group,) = generate_in_parts(engine, [asked], 20)  # pyright: ignore[reportArgumentType]
    assert engine.parts == 3 and len({tuple(c.token_ids) for c in group}) == 3
    for whole in group:
        assert whole.versions.tolist() == [old] * 20 + [old + 1] * 30 and not whole.stopped
        first, rest = (
            Completion(
                whole.token_ids[part], whole.logprobs[part], whole.sampling_logprobs[part], whole.versions[part], False
            )
            for part in (slice(20), slice(20, None))
        )
        assert served.reference.error("lora", 1, asked, first) < TOLERANCE
        continued = request((*LONG_PROMPT, *first.token_ids.tolist()), max_tokens=30)
        assert served.reference.error("dora", 2, continued, rest) < TOLERANCE


def test_an_aborted_call_leaves_vllm_and_the_others_go_on(served: Served) -> None:
    served.install("dora", 1)
    ((alone, _),) = served.engine.generate([request(seed=5)])
    flag = threading.Event()

    def endless() -> None:
        with abortable(flag):
            served.engine.generate([request(seed=6, max_tokens=200), request(LONG_PROMPT, seed=7, max_tokens=100)])

    with ThreadPoolExecutor(2) as threads, served.gate.shut():
        aborted = threads.submit(endless)
        served.gate.wait_for_engine()
        served.gate.allow(3)
        other = threads.submit(served.engine.generate, [request(seed=5)])
        flag.set()
        served.gate.open()
        with pytest.raises(Aborted):
            aborted.result(60)
        ((beside, _),) = other.result(60)
        assert beside.token_ids.tolist() == alone.token_ids.tolist()
    for asked in ([request()], []):
        with abortable(flag), pytest.raises(Aborted):
            served.engine.generate(asked)
    assert served.engine.occupancy().kv_usage == 0, "its blocks are free"
    for _ in range(3):  # and so are its slots
        served.install("lora", 1)
    served.check("lora", 1, request(seed=9))


def test_a_step_that_hangs_has_a_length(served: Served) -> None:
    served.install("lora", 1)
    served.engine.generate([request()])
    assert served.engine.occupancy().step_seconds == 0
    with ThreadPoolExecutor(1) as threads, served.gate.shut():
        waiting = threads.submit(served.engine.generate, [request()])
        served.gate.wait_for_engine()
        time.sleep(0.3)
        assert 0.3 <= served.engine.occupancy().step_seconds < 5
        served.gate.open()
        waiting.result(30)
    wait_until(lambda: served.engine.occupancy().step_seconds == 0)
