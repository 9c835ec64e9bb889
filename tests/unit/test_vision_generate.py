"""The torch engine on prompts with images: samples, log-probs and snapshots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import shake
from decoders import CPU
from fakes import make_rollout
from tiny import make_vl_model
from transformers import Qwen3VLForConditionalGeneration
from vision_inputs import hugging_face_inputs
from vision_learners import vision_groups, vl_config

from actors.torch_engine.engine import TorchEngine
from learner.learner import Learner
from learner.policy import build_policy
from tora.adapters.inject import from_wire, snapshot
from tora.batching.batch import micro_batches
from tora.models.load import load_decoder
from tora.models.vision.processor import ImageProcessor
from tora.types import Group, LogprobRequest, Prompt, SampleRequest, Sampling, TrainBatch

LONG = 150
"""Tokens to generate: enough to make the cache grow."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[Prompt]:
    return [group.prompt for group in vision_groups(folder)]


def engine_of(model: Any, folder: Path, *, shared: bool = True) -> TorchEngine:
    return TorchEngine(model, device=CPU, shared=shared, max_rows=100, processor=lambda: ImageProcessor(folder))


def requests(prompts: list[Prompt], sampling: Sampling) -> list[SampleRequest]:
    return [SampleRequest(p.token_ids, 2, 7 + p.id, sampling, p.images) for p in prompts]


def expected_logprobs(model: Any, folder: Path, prompt: Prompt, completion: list[int]) -> torch.Tensor:
    """From transformers, in one forward without a cache."""
    processor, ids = ImageProcessor(folder), torch.tensor([*prompt.token_ids, *completion])[None]
    with torch.no_grad():
        logits = model(**hugging_face_inputs(processor, ids, prompt.images)).logits[0, len(prompt.token_ids) - 1 : -1]
    return logits.log_softmax(1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_decoding_with_a_cache_equals_the_full_forward(folder: Path, prompts: list[Prompt]) -> None:
    """Rows with no, one and two images; some finish early, and the cache grows."""
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ours = load_decoder(folder, dtype=torch.float32, device=CPU)
    engine = engine_of(ours, folder)
    engine.install(snapshot(ours, 3))
    image_token = ImageProcessor(folder).image_token_id
    stop = tuple(range(10, 14))
    lengths = []
    for prompt, completions in zip(
        prompts, engine.generate(requests(prompts, Sampling(LONG, stop_token_ids=stop))), strict=True
    ):
        for completion in completions:
            ids = completion.token_ids.tolist()
            lengths.append(len(ids))
            if image_token in ids:  # transformers would expect one more image
                continue
            expected = expected_logprobs(theirs, folder, prompt, ids)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-4, rtol=1e-4)
    assert min(lengths) < max(lengths)
    longest = max(len(p.token_ids) for p in prompts) + max(lengths)
    assert longest > 8 * 17, "the cache grew"


def test_logprobs_of_given_completions_equal_transformers(folder: Path, prompts: list[Prompt]) -> None:
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ours = load_decoder(folder, dtype=torch.float32, device=CPU)
    engine = engine_of(ours, folder)
    engine.install(snapshot(ours, 0))
    completion = tuple(range(40, 52))
    scores = engine.logprobs([LogprobRequest(p.token_ids, completion, p.images) for p in prompts], adapter=True)
    for prompt, score in zip(prompts, scores, strict=True):
        expected = expected_logprobs(theirs, folder, prompt, list(completion))
        torch.testing.assert_close(torch.from_numpy(score), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("lora_type", "train_vision"), [("dora_cache", "lora"), ("lora", "full"), ("full", "full"), ("full", "none")]
)
def test_a_copy_serves_the_learners_policy(
    folder: Path, prompts: list[Prompt], lora_type: str, train_vision: str
) -> None:
    """Its samples have the learner's log-probs, although the snapshot holds trained tensors only."""
    cfg = vl_config(folder, lora_type, train_vision)
    learner, copy = Learner(cfg), build_policy(cfg, CPU)
    if lora_type != "full":
        shake(learner.model)
    else:
        learner.step(TrainBatch(_batch(prompts, [np.arange(20, 30)] * 8, [np.zeros(10, np.float32)] * 8), 1.0))
    engine = engine_of(copy, folder, shared=False)
    sent = learner.snapshot()
    report = engine.install(sent)
    assert report.sha256 == sent.sha256
    completions = [c for group in engine.generate(requests(prompts, Sampling(12))) for c in group]
    batch = _batch(prompts, [c.token_ids for c in completions], [c.logprobs for c in completions])
    metrics = learner.step(TrainBatch(batch, 1.0)).metrics
    assert metrics["mismatch_kl"] < 1e-8 and metrics["mismatch_max_ratio"] < 1.001


def _batch(prompts: list[Prompt], ids: list[np.ndarray], logprobs: list[np.ndarray]) -> Any:
    rollouts = [
        replace(make_rollout(i, float(n % 2)), actor_logprobs=lp)
        for n, (i, lp) in enumerate(zip(ids, logprobs, strict=True))
    ]
    groups = [Group(p, tuple(rollouts[2 * n : 2 * n + 2])) for n, p in enumerate(prompts)]
    return micro_batches(
        groups, normalize_advantages=True, normalization="token", max_generated_tokens=20, capacity=10_000
    )


def test_a_snapshot_without_the_tower_is_refused(folder: Path) -> None:
    sender, receiver = (build_policy(vl_config(folder, "lora", kind), CPU) for kind in ("none", "lora"))
    with pytest.raises(ValueError, match="differ in 18 adapted layers"):
        from_wire(receiver, dict.fromkeys([f"{n}.lora_A.weight" for n in _modules(sender)], torch.zeros(1)))


def _modules(model: Any) -> set[str]:
    return {entry.name.rpartition(".lora_")[0] for entry in snapshot(model, 0).entries}
