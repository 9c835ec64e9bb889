"""A new policy version while sequences are running: real vLLM against PEFT in float32."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from stepped import StepGate
from tiny import make_text_model

pytest.importorskip("vllm")

from peft_reference import TOLERANCE, Reference
from vllm_engines import LONG_PROMPT, request, start_engine, wait_until

from actors.vllm_engine.engine import VLLMEngine
from actors.vllm_engine.weight_updates import InFlight
from tora.types import Completion, SampleRequest

OLD, NEW = ("lora", 1), ("dora", 2)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(make_text_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", params=[False, True], ids=["keep", "recompute"])
def recompute(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def gate() -> StepGate:
    return StepGate()


@pytest.fixture(scope="module")
def engine(reference: Reference, recompute: bool, gate: StepGate) -> Iterator[VLLMEngine]:
    engine = start_engine(reference.folder, update=InFlight(recompute_kv=recompute), gate=gate, pins=True)
    yield engine
    engine.close()


def in_flight(
    engine: VLLMEngine, reference: Reference, gate: StepGate, version: int, asked: SampleRequest
) -> list[Completion]:
    """The completions of a request that gets a new version after 40 tokens. A second request was queued but not started
    when the new version arrived."""
    engine.install(reference.snapshot(version, *OLD))
    engine.generate([asked])  # fills the old version's prefix cache with its prompt
    with ThreadPoolExecutor(3) as threads, gate.shut():
        generating: Future[list[list[Completion]]] = threads.submit(engine.generate, [asked])
        gate.allow(40)
        gate.wait_for_engine()
        queued = threads.submit(engine.generate, [request(LONG_PROMPT, seed=7)])
        wait_until(lambda: len(engine._commands) == 1)
        installing = threads.submit(engine.install, reference.snapshot(version + 1, *NEW))
        wait_until(lambda: len(engine._commands) == 2)
        gate.open()
        assert installing.result(30).stall_seconds > 0
        (group,), (neighbours,) = generating.result(30), queued.result(30)
    for neighbour in neighbours:
        assert (neighbour.versions == version + 1).all()
        assert reference.error(*NEW, request(LONG_PROMPT, seed=7), neighbour) < TOLERANCE, "served from the old cache"
    return group


def test_running_sequences_continue_under_the_new_version(
    engine: VLLMEngine, reference: Reference, recompute: bool, gate: StepGate
) -> None:
    asked = request(LONG_PROMPT, max_tokens=90, num_samples=3)
    for version in (10, 20):
        for completion in in_flight(engine, reference, gate, version, asked):
            tokens = completion.token_ids
            # the step before the install ran under the old version
            assert completion.versions.tolist() == [version] * 41 + [version + 1] * 49
            logprobs = torch.from_numpy(completion.logprobs)
            before, after = logprobs_of(reference, OLD, asked, tokens), logprobs_of(reference, NEW, asked, tokens)
            assert (logprobs[:41] - before[:41]).abs().max() < TOLERANCE
            mixed = logprobs_of(reference, NEW, asked, tokens, (OLD, len(asked.token_ids) + 40))
            right, wrong = (after, mixed) if recompute else (mixed, after)
            assert (logprobs[41:] - right[41:]).abs().max() < TOLERANCE
            assert (logprobs[41:] - wrong[41:]).abs().max() > 0.1, "the two settings differ visibly"


def test_blocks_of_a_continued_sequence_are_not_shared(
    engine: VLLMEngine, reference: Reference, gate: StepGate
) -> None:
    asked = request(LONG_PROMPT, max_tokens=90, num_samples=2)
    for completion in in_flight(engine, reference, gate, 30, asked):
        # a longer request with the same tokens would hit all of its full blocks
        longer = request((*LONG_PROMPT, *completion.token_ids.tolist()))
        for sample in engine.generate([longer])[0]:
            assert reference.error(*NEW, longer, sample) < TOLERANCE
    engine.install(reference.snapshot(32, *OLD))
    for sample in engine.generate([asked])[0]:
        assert (sample.versions == 32).all()
        assert reference.error(*OLD, asked, sample) < TOLERANCE


def test_no_new_version_reaches_a_pinned_request(engine: VLLMEngine, reference: Reference, gate: StepGate) -> None:
    asked = replace(request(LONG_PROMPT, max_tokens=90), pinned=True)
    engine.install(reference.snapshot(40, *OLD))
    assert engine.pin(reference.snapshot(40, *OLD)).version == 40
    engine.generate([replace(asked, pinned=False)])  # fills the prefix cache with its prompt
    with ThreadPoolExecutor(2) as threads, gate.shut():
        generating = threads.submit(engine.generate, [asked])
        gate.allow(40)
        gate.wait_for_engine()
        installing = threads.submit(engine.install, reference.snapshot(41, *NEW))
        wait_until(lambda: len(engine._commands) == 1)
        gate.open()
        installing.result(30)
        (group,) = generating.result(30)
    for completion in [*group, *engine.generate([asked])[0]]:
        assert (completion.versions == 40).all()
        assert reference.error(*OLD, asked, completion) < TOLERANCE
    for completion in engine.generate([replace(asked, pinned=False)])[0]:
        assert (completion.versions == 41).all() and reference.error(*NEW, asked, completion) < TOLERANCE
    with pytest.raises(ValueError, match="others that are not"):
        engine.generate([asked, replace(asked, pinned=False)])


@torch.no_grad()
def logprobs_of(
    reference: Reference,
    policy: tuple[str, int],
    asked: SampleRequest,
    tokens_L: np.ndarray,
    begun: tuple[tuple[str, int], int] | None = None,
) -> torch.Tensor:
    """[L], at temperature 1. `begun`: another policy, and for how many first positions its keys and values are used."""
    ids, start = torch.tensor([[*asked.token_ids, *tokens_L.tolist()]]), len(asked.token_ids)
    if begun is None:
        logits = reference.model(*policy)(input_ids=ids).logits[0, start - 1 : -1]
    else:
        other, count = begun
        first = reference.model(*other)(input_ids=ids[:, :count], use_cache=True)
        rest = reference.model(*policy)(input_ids=ids[:, count:], past_key_values=first.past_key_values)
        logits = torch.cat([first.logits[0], rest.logits[0]])[start - 1 : -1]
    return logits.log_softmax(1).gather(1, torch.from_numpy(tokens_L)[:, None])[:, 0]
