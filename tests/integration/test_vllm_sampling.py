"""vLLM under penalties and truncation: it reports the policy too, and the learner finds ratio 1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import shake
from decoders import packed_logits
from distributions import SETTINGS, expected
from fakes import make_prompt, make_rollout
from learners import config, make_batch
from stops import cut, free_texts
from tiny import make_text_model, make_tokenizer
from torch_engines import engine_of
from vllm_engines import LONG_PROMPT, PROMPT, start_engine

from actors.vllm_engine.engine import VLLMEngine
from learner.learner import Learner
from tora.tasks.tokenizer import load_tokenizer, stop_token_ids
from tora.types import Completion, Group, SampleRequest, Sampling

pytest.importorskip("vllm")
PROMPTS = (PROMPT, LONG_PROMPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def learner(folder: Path) -> Learner:
    learner = Learner(config(folder))
    shake(learner.model)
    return learner


@pytest.fixture(scope="module")
def engine(folder: Path, learner: Learner) -> Iterator[VLLMEngine]:
    engine = start_engine(folder)
    engine.install(learner.snapshot())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def completions(engine: VLLMEngine) -> dict[str, list[list[Completion]]]:
    """Of all settings, drawn in one batch of vLLM's, so that rows of every kind share its sampler."""
    settings = {name: Sampling(12, **changes) for name, changes in SETTINGS.items()}
    requests = [SampleRequest(ids, 4, 7, sampling) for sampling in settings.values() for ids in PROMPTS]
    answers = iter(engine.generate(requests))
    return {name: [next(answers) for _ in PROMPTS] for name in settings}


@pytest.mark.parametrize("setting", SETTINGS)
def test_vllm_reports_both_distributions(
    completions: dict[str, list[list[Completion]]], learner: Learner, setting: str
) -> None:
    sampling = Sampling(12, **SETTINGS[setting])
    for ids, group in zip(PROMPTS, completions[setting], strict=True):
        for c in group:
            whole = [*ids, *c.token_ids.tolist()]
            with torch.no_grad():
                logits = packed_logits(learner.model, [torch.tensor(whole)])[len(ids) - 1 : -1]
            policy, drawn = expected(logits, whole, len(ids), sampling)
            np.testing.assert_allclose(c.logprobs, policy, atol=5e-5)
            np.testing.assert_allclose(c.sampling_logprobs, drawn, atol=5e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_policies_have_ratio_one(
    completions: dict[str, list[list[Completion]]], folder: Path, learner: Learner, setting: str
) -> None:
    groups = [
        Group(
            replace(make_prompt(i), token_ids=ids),
            tuple(
                replace(make_rollout(c.token_ids, g % 2), actor_logprobs=c.logprobs, versions=c.versions)
                for g, c in enumerate(group)
            ),
        )
        for i, (ids, group) in enumerate(zip(PROMPTS, completions[setting], strict=True))
    ]
    trained = Learner(config(folder))
    shake(trained.model)
    metrics = trained.step(make_batch(groups, temperature=SETTINGS[setting].get("temperature", 1.0))).metrics
    assert abs(metrics["mismatch_max_ratio"] - 1) < 1e-4
    assert metrics["mismatch_kl"] < 1e-6
    assert metrics["learner/grad_norm"] > 0


def test_stop_strings_end_vllms_completions_where_they_end_the_torch_engines(
    engine: VLLMEngine, learner: Learner
) -> None:
    """The texts differ, since the engines draw differently; each is cut where a whole decoding has the string."""
    tokenizer = make_tokenizer()
    free = [SampleRequest(ids, 4, 7, Sampling(24)) for ids in PROMPTS]
    ids_PG = [[c.token_ids.tolist() for c in group] for group in engine.generate(free)]
    stop = free_texts(tokenizer, ids_PG)
    stopped = engine.generate([replace(request, sampling=Sampling(24, stop=stop)) for request in free])
    seen = 0
    for before, after in zip((ids for g in ids_PG for ids in g), (c for g in stopped for c in g), strict=True):
        expected = cut(tokenizer, before, stop)
        assert after.token_ids.tolist() == expected
        assert len(after.logprobs) == len(after.sampling_logprobs) == len(after.versions) == len(expected)
        assert after.stopped == any(text in tokenizer.decode(expected) for text in stop)
        seen += len(expected) < len(before)
    assert seen
    torch_engine = engine_of(learner, tokenizer=make_tokenizer)
    for request in free:
        unbound = [c.token_ids.tolist() for c in torch_engine.generate([request])[0]]
        bound = torch_engine.generate([replace(request, sampling=Sampling(24, stop=stop))])[0]
        assert [c.token_ids.tolist() for c in bound] == [cut(tokenizer, ids, stop) for ids in unbound]


def test_both_engines_stop_at_each_end_token_that_the_model_lists(
    tmp_path: Path, folder: Path, engine: VLLMEngine, learner: Learner
) -> None:
    """Greedily, so that both have the same tokens; each list entry ends a completion that has it first."""
    free = [SampleRequest(ids, 1, 7, Sampling(24, temperature=0.0)) for ids in PROMPTS]
    whole = [group[0].token_ids.tolist() for group in engine.generate(free)]
    ends = [ids[5 + 7 * i] for i, ids in enumerate(whole)]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    stop = stop_token_ids(tmp_path, load_tokenizer(tmp_path, None))
    assert len(set(ends)) == 2 and set(ends) < set(stop)
    bound = [replace(request, sampling=replace(request.sampling, stop_token_ids=stop)) for request in free]
    for served in (engine, engine_of(learner)):
        found = [group[0] for group in served.generate(bound)]
        cut = [ids[: min(ids.index(end) for end in ends if end in ids) + 1] for ids in whole]
        assert [c.token_ids.tolist() for c in found] == cut
        assert all(c.stopped for c in found) and {ids[-1] for ids in cut} == set(ends)
        (unbound,) = served.generate([replace(bound[0], sampling=replace(bound[0].sampling, max_tokens=3))])
        assert not unbound[0].stopped and len(unbound[0].token_ids) == 3
