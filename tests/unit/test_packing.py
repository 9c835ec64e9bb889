"""Packed batches, with and without shared prompts, against padded ones: the same loss and gradients."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from decoders import attention_inputs
from learners import LOSS, SETTINGS, config, make_batch, make_groups, weights
from tiny import make_text_model
from torch._dynamo.utils import counters

from learner.learner import Learner
from tora.batching.batch import micro_batches
from tora.batching.packing import distinct
from tora.bench.packing import PaddedLearner
from tora.models.attention import PackedAttention, Scores
from tora.models.varlen import VarlenAttention, VarlenFrameAttention, supports_varlen
from tora.models.vision.layout import FrameAttention

PLAIN: dict[str, Any] = {
    "loss": LOSS,
    "clip_grad_norm": None,
    "optimizer": {"_component_": "torch.optim.SGD", "lr": 1.0},
}
"""With these settings a step changes the weights by exactly its gradient."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), "qwen2")


def gradients(
    kind: type[Learner], folder: Path, lora_type: str, *, episodes: bool = False, **batch: Any
) -> tuple[dict[str, float], Any]:
    """The metrics of a step and its gradients. B starts away from zero, so that A has a gradient too."""
    learner = kind(config(folder, lora_type, **PLAIN))
    torch.manual_seed(1)
    for name, tensor in learner.model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(tensor, std=0.02)
    before = weights(learner)
    metrics = learner.step(make_batch(make_groups(3, episodes=episodes), **batch)).metrics
    return metrics, {name: before[name] - after for name, after in weights(learner).items()}


@pytest.mark.parametrize(
    ("lora_type", "episodes"),
    [("full", False), ("lora", False), ("lora", True), ("dora", False), ("dora_cache", False)],
)
def test_packed_and_shared_batches_equal_padded_ones(folder: Path, lora_type: str, episodes: bool) -> None:
    padded, expected = gradients(PaddedLearner, folder, lora_type, episodes=episodes)
    assert sum(float(g.abs().sum()) for g in expected.values()) > 0
    for batch in ({}, {"capacity": 60}, {"share_prefix": True}, {"share_prefix": True, "capacity": 45}):
        metrics, found = gradients(Learner, folder, lora_type, episodes=episodes, **batch)
        for name in ("loss/total", "kl/mean", "learner/grad_norm", "policy/entropy", "mismatch_kl"):
            assert metrics[name] == pytest.approx(padded[name], rel=1e-4, abs=1e-6), (name, batch)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_shared_prompts_do_not_recompile(folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Dynamo decides alone what compiles again; a backend of kernels adds two minutes and its rounding."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = (Learner(config(folder, "dora_cache", loss=LOSS, compile=c)) for c in (False, True))
    graphs = []
    for seed, capacity in enumerate((10_000, 45, 10_000, 38)):
        batch = make_batch(make_groups(2 + seed, seed=seed), share_prefix=True, capacity=capacity)
        a, b = eager.step(batch).metrics, compiled.step(batch).metrics
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=2e-3, abs=1e-5)
        assert a["learner/grad_norm"] == pytest.approx(b["learner/grad_norm"], rel=2e-3, abs=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[3] and not counters["graph_break"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("capacity", [10, 30, 45, 10_000])
def test_a_shared_prompt_appears_once_before_its_completions(capacity: int, num_ranks: int) -> None:
    groups = make_groups(4, seed=3)
    micro = micro_batches(groups, capacity=capacity, num_ranks=num_ranks, share_prefix=True, **SETTINGS)
    assert len(micro) % num_ranks == 0 or all(len(x.lengths_B) == 1 for x in micro)
    found: Counter[tuple[int, ...]] = Counter()
    for x in micro:
        num_prompts, prompt_ends = len(x.prompt_lengths_P), x.prompt_lengths_P.cumsum()
        assert x.prompt_lengths_P.sum() + x.lengths_B.sum() == len(x.tokens_T) == len(x.positions_T)
        assert len(x.tokens_T) <= capacity or len(x.lengths_B) == 1
        prompts = [tuple(x.tokens_T[end - n : end]) for end, n in zip(prompt_ends, x.prompt_lengths_P, strict=True)]
        assert len(set(prompts)) == num_prompts == len(set(x.groups_B))
        starts = x.prompt_lengths_P.sum() + x.lengths_B.cumsum() - x.lengths_B
        for b, (start, length, p) in enumerate(zip(starts, x.lengths_B, x.prompt_B, strict=True)):
            completion = x.tokens_T[start : start + length]
            assert prompts[p] == groups[x.groups_B[b]].prompt.token_ids
            assert (x.targets_N[x.sequence_N == b] == completion).all()
            predicting = x.response_N[x.sequence_N == b]
            assert (
                predicting[0] == prompt_ends[p] - 1
                and (predicting[1:] == start + torch.arange(length - 1).numpy()).all()
            )
            assert (x.positions_T[start : start + length] == len(prompts[p]) + torch.arange(length).numpy()).all()
            found[tuple(completion)] += 1
    assert found == Counter(tuple(r.token_ids) for group in groups for r in group.rollouts)


def reference_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """`varlen_attn` as torch documents it; torch has no CPU kernel for it."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths_q, lengths_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(lengths_q), max(lengths_k)) == (max_q, max_k) and window_size[1] in (0, -1)
    documents = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    rows = [[x.transpose(0, 1)[None] for x in document] for document in documents]
    out = []
    for q, k, v in rows:
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        seen = ((window_size[1] < 0) | (distance >= 0)) & ((window_size[0] < 0) | (distance <= window_size[0]))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa))
    return torch.cat([x[0].transpose(0, 1) for x in out])


def test_varlen_attention_equals_packed_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tora.models.varlen.varlen_attn", reference_varlen_attn)
    lengths = [5, 1, 17, 8]
    inputs = attention_inputs(lengths, "cpu", torch.float32)
    varlen, packed = VarlenAttention(torch.tensor(lengths)), PackedAttention(torch.tensor(lengths))
    for scores in (Scores(), Scores(0.2), Scores(window=3), Scores(0.2, 6), Scores(cap=2.0)):
        torch.testing.assert_close(varlen(*inputs, scores), packed(*inputs, scores))
    frames = VarlenFrameAttention(torch.tensor(lengths)), FrameAttention(torch.tensor(lengths))
    q, k, v = (x.repeat_interleave(heads, 2) for x, heads in zip(inputs, (1, 2, 2), strict=True))
    torch.testing.assert_close(*(attend(q, k, v) for attend in frames))
    assert not supports_varlen(torch.device("cpu"), torch.bfloat16)


def test_images_that_differ_in_their_middle_alone_are_distinct() -> None:
    """Equal ones are the same image wherever they come from."""
    rng = np.random.default_rng(0)
    pool = [b"", b"\x00", *(b"start" * 20 + rng.bytes(3) + b"end" * 30 for _ in range(4)), rng.bytes(50), bytes(500)]
    for _ in range(50):
        shown = [bytes(bytearray(pool[i])) for i in rng.integers(0, len(pool), rng.integers(0, 12))]
        images, image_I = distinct(shown)
        assert images == tuple(dict.fromkeys(shown))
        assert [images[i] for i in image_I] == shown and image_I.dtype == np.int64
