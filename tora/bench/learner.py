"""Seconds per gradient step and generated tokens per second of several settings, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from learner.learner import Learner
from tora.batching.batch import micro_batches
from tora.bench.memory import peak_bytes
from tora.bench.rows import LoraType, Row, Samples, Setting, make_row
from tora.bench.vision import TOKEN_IDS, image_prompt
from tora.config.schema import ModelConfig, RunConfig
from tora.errors import ConfigError
from tora.launch.engines import shared_torch_engine
from tora.models.vision.qwen3_vl import Qwen3VL
from tora.types import Group, Prompt, Rollout, SampleRequest, Sampling, StopReason, TrainBatch

Dtype = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What each gradient step trains on, and what the engine generates."""

    tokens: int = 2048
    """Packed tokens per step."""
    sequence: int = 256
    """Tokens of a prompt and its completion together, half each."""
    image: int = 0
    """Side in pixels of a square image in front of every prompt, for a vision model; 0 for none."""
    rows: int = 16
    """Rollouts decoded at the same time."""
    new_tokens: int = 32
    """Tokens generated per rollout."""
    rounds: int = 7
    """Measured rounds, each of which measures every setting once. One warm-up round precedes them."""


def all_settings(compiled: Sequence[bool]) -> list[Setting]:
    """Every method with each value of `compile` in `compiled`."""
    kinds: tuple[LoraType, ...] = ("lora", "dora", "dora_cache")
    one = [Setting("full"), *(Setting(kind, quantize) for quantize in (False, True) for kind in kinds)]
    return [replace(setting, compile=compile_) for compile_ in compiled for setting in one]


def make_config(folder: Path, setting: Setting, *, dtype: Dtype, rank: int, tokens: int) -> RunConfig:
    return RunConfig(
        name="bench",
        dtype=dtype,
        compile=setting.compile,
        micro_batch_tokens=tokens,
        model=ModelConfig(
            path=str(folder), lora_type=setting.lora_type, lora_rank=rank, quantize_base=setting.quantize_base
        ),
        dataset={},
        rewards=[],
    )


def make_prompt(workload: Workload, folder: Path, vocab_size: int) -> Prompt:
    """Random text, after an image if the workload has one."""
    ids, images = (), ()
    if workload.image:
        ids, image = image_prompt(folder, workload.image)
        images = (image,)
    text = np.random.default_rng(0).integers(len(TOKEN_IDS) + 1, vocab_size, workload.sequence // 2)
    return Prompt(0, (*ids, *text.tolist()), "", {}, images)


def make_batch(workload: Workload, prompt: Prompt, vocab_size: int) -> TrainBatch:
    """Random tokens and rewards, in sequences of equal length."""
    rng = np.random.default_rng(1)
    length = workload.sequence // 2
    count = max(2, workload.tokens // (len(prompt.token_ids) + length))

    def rollout() -> Rollout:
        ids = rng.integers(0, vocab_size, length)
        logprobs, reward = np.full(length, -np.log(vocab_size), dtype=np.float32), float(rng.random())
        versions, sampled = np.zeros(length, dtype=np.int64), np.ones(length, dtype=bool)
        return Rollout(ids, sampled, logprobs, versions, StopReason.STOP, "", reward, {"random": reward})

    group = Group(prompt, tuple(rollout() for _ in range(count)))
    micro = micro_batches(
        [group],
        normalize_advantages=True,
        normalization="token",
        max_generated_tokens=length,
        capacity=workload.tokens,
    )
    return TrainBatch(micro, 1.0)


def static_bytes(learner: Learner) -> int:
    """Bytes of all weights, and of the trained weights' gradients and two optimizer moments."""
    weights = sum(p.nbytes for p in learner.model.parameters())
    return weights + sum(3 * p.nbytes for p in learner.model.parameters() if p.requires_grad)


def measure(
    learner: Learner, prompt: Prompt, batch: TrainBatch, workload: Workload, samples: Samples, *, generate: bool
) -> None:
    """Measure one setting in one round, and append to `samples`."""

    def step() -> None:
        _synchronize(learner.device)
        start = time.perf_counter()
        learner.step(batch)
        _synchronize(learner.device)
        samples.seconds.append(time.perf_counter() - start)

    samples.peak_bytes.append(static_bytes(learner) + peak_bytes(learner.device, step))
    if generate:
        samples.tokens_per_s.append(tokens_per_second(learner, prompt, workload))


def tokens_per_second(learner: Learner, prompt: Prompt, workload: Workload) -> float:
    """Throughput of the torch engine on the learner's model."""
    rollout = replace(learner.cfg.rollout, concurrency=workload.rows, enforce_eager=True)
    engine = shared_torch_engine(replace(learner.cfg, grpo_samples=1, rollout=rollout), learner)
    engine.install(learner.snapshot())
    request = SampleRequest(prompt.token_ids, workload.rows, 0, Sampling(workload.new_tokens), prompt.images)
    _synchronize(learner.device)
    start = time.perf_counter()
    (completions,) = engine.generate([request])
    _synchronize(learner.device)
    return sum(len(c.token_ids) for c in completions) / (time.perf_counter() - start)


def run(
    folder: Path,
    settings: Sequence[Setting],
    workload: Workload,
    *,
    dtype: Dtype,
    rank: int,
    generate: bool,
    interleave: bool,
) -> list[Row]:
    """`interleave`: load all models and measure them in turn, which is fair on a machine whose speed drifts. Otherwise
    load and measure one model after the other, for models that do not fit into memory together.

    Raises ConfigError if the workload has an image and the model takes none.
    """
    samples = {setting: Samples() for setting in settings}
    for loaded in [list(settings)] if interleave else [[s] for s in settings]:
        configs = {s: make_config(folder, s, dtype=dtype, rank=rank, tokens=workload.tokens) for s in loaded}
        learners = {setting: Learner(cfg) for setting, cfg in configs.items()}
        model = next(iter(learners.values())).model
        if workload.image and not isinstance(model, Qwen3VL):
            raise ConfigError(f"--image {workload.image} needs the shapes of a vision model, such as qwen3_vl/2B.")
        vocab_size = model.embedding.shape[0]
        prompt = make_prompt(workload, folder, vocab_size)
        batch = make_batch(workload, prompt, vocab_size)
        for round_ in range(workload.rounds + 1):
            for setting, learner in learners.items():
                sink = samples[setting] if round_ else Samples()  # round 0 warms up compilers and allocators
                measure(learner, prompt, batch, workload, sink, generate=generate)
        del learners, model
        torch.cuda.empty_cache()
    return [make_row(setting, samples) for setting in settings]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
