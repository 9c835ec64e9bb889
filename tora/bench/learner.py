"""Seconds a gradient step and generated tokens a second, of every setting side by side."""

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
from tora.types import Group, Prompt, Rollout, SampleRequest, Sampling, TrainBatch

Dtype = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class Load:
    """What a step trains and an engine generates."""

    tokens: int = 2048
    """Packed tokens a step."""
    sequence: int = 256
    """Tokens of a prompt and its completion, half each."""
    image: int = 0
    """Side of a square image before every prompt, in pixels, for a vision model; 0 is none."""
    rows: int = 16
    """Rollouts decoded at once."""
    new_tokens: int = 32
    rounds: int = 7
    """Measured rounds; each measures every setting once. The first one on top is thrown away."""


def all_settings(compiled: Sequence[bool]) -> list[Setting]:
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


def make_prompt(load: Load, folder: Path, vocab_size: int) -> Prompt:
    """Random text, behind an image where the load has one."""
    ids, images = (), ()
    if load.image:
        ids, image = image_prompt(folder, load.image)
        images = (image,)
    text = np.random.default_rng(0).integers(len(TOKEN_IDS) + 1, vocab_size, load.sequence // 2)
    return Prompt(0, (*ids, *text.tolist()), "", {}, images)


def make_batch(load: Load, prompt: Prompt, vocab_size: int) -> TrainBatch:
    """Random tokens and rewards, in sequences of one length."""
    rng = np.random.default_rng(1)
    length = load.sequence // 2
    count = max(2, load.tokens // (len(prompt.token_ids) + length))

    def rollout() -> Rollout:
        ids = rng.integers(0, vocab_size, length)
        logprobs, reward = np.full(length, -np.log(vocab_size), dtype=np.float32), float(rng.random())
        return Rollout(ids, logprobs, np.zeros(length, dtype=np.int64), True, "", reward, {"random": reward})

    group = Group(prompt, tuple(rollout() for _ in range(count)))
    micro = micro_batches(
        [group],
        normalize_advantages=True,
        normalization="token",
        max_generated_tokens=length,
        capacity=load.tokens,
    )
    return TrainBatch(micro, 1.0)


def static_bytes(learner: Learner) -> int:
    """Weights, gradients of what is trained, and the optimizer's moments."""
    weights = sum(p.nbytes for p in learner.model.parameters())
    return weights + sum(3 * p.nbytes for p in learner.model.parameters() if p.requires_grad)


def measure(
    learner: Learner, prompt: Prompt, batch: TrainBatch, load: Load, samples: Samples, *, generate: bool
) -> None:
    """One round of one setting."""

    def step() -> None:
        _synchronize(learner.device)
        start = time.perf_counter()
        learner.step(batch)
        _synchronize(learner.device)
        samples.seconds.append(time.perf_counter() - start)

    samples.peak_bytes.append(static_bytes(learner) + peak_bytes(learner.device, step))
    if generate:
        samples.tokens_per_s.append(tokens_per_second(learner, prompt, load))


def tokens_per_second(learner: Learner, prompt: Prompt, load: Load) -> float:
    rollout = replace(learner.cfg.rollout, concurrency=load.rows, enforce_eager=True)
    engine = shared_torch_engine(replace(learner.cfg, grpo_samples=1, rollout=rollout), learner)
    engine.install(learner.snapshot())
    request = SampleRequest(prompt.token_ids, load.rows, 0, Sampling(load.new_tokens), prompt.images)
    _synchronize(learner.device)
    start = time.perf_counter()
    (completions,) = engine.generate([request])
    _synchronize(learner.device)
    return sum(len(c.token_ids) for c in completions) / (time.perf_counter() - start)


def run(
    folder: Path, settings: Sequence[Setting], load: Load, *, dtype: Dtype, rank: int, generate: bool, together: bool
) -> list[Row]:
    """`together`: every model in memory at once and measured in turn, which is fair to all on a drifting machine;
    otherwise one after the other, for models of which only one fits."""
    samples = {setting: Samples() for setting in settings}
    for share in [list(settings)] if together else [[s] for s in settings]:
        learners = {s: Learner(make_config(folder, s, dtype=dtype, rank=rank, tokens=load.tokens)) for s in share}
        model = next(iter(learners.values())).model
        if load.image and not isinstance(model, Qwen3VL):
            raise ConfigError(f"--image {load.image} needs the shapes of a vision model, such as qwen3_vl/2B.")
        vocab_size = model.tok_embeddings.num_embeddings
        prompt = make_prompt(load, folder, vocab_size)
        batch = make_batch(load, prompt, vocab_size)
        for round_ in range(load.rounds + 1):
            for setting, learner in learners.items():
                sink = samples[setting] if round_ else Samples()  # the first warms up compilers and allocators
                measure(learner, prompt, batch, load, sink, generate=generate)
        del learners, model
        torch.cuda.empty_cache()
    return [make_row(setting, samples) for setting in settings]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
