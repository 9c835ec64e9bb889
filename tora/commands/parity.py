"""`tora doctor --parity MODEL`: check that vLLM and the learner give the same tokens the same log-probs.

The learner gets a random adapter with an effect large enough to measure and sends it to vLLM as in a run. vLLM samples
with it, then both score the samples, with the adapter and without. For a vision model the prompts have zero, one and
two images, and the vision tower and its mergers have adapters too.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tora.adapters.inject import refresh, trained_parameters
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.config.schema import ModelConfig, RolloutConfig, RunConfig
from tora.errors import ConfigError
from tora.launch.engines import INSTALL, make_vllm_engine
from tora.models.decoder import Decoder
from tora.models.vision.processor import ImageProcessor, has_image_processor
from tora.protocols import Engine
from tora.reporting.strict_json import to_json
from tora.tasks.tokenizer import load_tokenizer
from tora.types import LogprobRequest, Prompt, Rollout, SampleRequest, Sampling, StopReason

_TEXTS = ("The capital of France is", "def add(a, b):\n", "Once upon a time", "2 + 2 =")
_IMAGES = ((), ((96, 64),), ((64, 128), (96, 64)))
"""(width, height) of each vision prompt's images, in pixels; the model's processor may enlarge them."""
_SAMPLES, _NEW_TOKENS = 4, 32
_MAX_GAP = {"fp32": 1e-4, "bf16": 0.1}
"""Largest mean difference that passes, by dtype, in nats."""
_NOISE_STD = 0.05
"""Standard deviation of the random adapter."""


@dataclass(frozen=True, slots=True)
class ParityRow:
    """Absolute differences between the log-probs of engine and learner for the same tokens, in nats."""

    method: Literal["lora", "dora", "qlora", "qdora"]
    dtype: str
    sampled_mean: float
    """With the adapter; the engine's log-probs are those it reported while sampling."""
    sampled_max: float
    on_mean: float
    """With the adapter; the engine's log-probs are those it computes for given tokens."""
    on_max: float
    off_mean: float
    """Without the adapter."""
    off_max: float
    effect: float
    """Mean difference that the adapter makes to the learner's log-probs."""
    tokens: int
    """Number of tokens compared."""

    @property
    def holds(self) -> bool:
        gaps = (self.sampled_mean, self.on_mean, self.off_mean)  # max() of these might pass over a nan
        return all(gap <= _MAX_GAP[self.dtype] for gap in gaps) and self.effect > 0


def parity(model: str, *, as_json: bool = False) -> int:
    """Prints a row for each method and dtype. Returns 0 if all of them hold, else 1.

    Raises ConfigError if vLLM is not installed or the folder does not hold a model.
    """
    if find_spec("vllm") is None:
        raise ConfigError(f"--parity needs vLLM: {INSTALL}.")
    if not Path(model, "config.json").is_file():
        raise ConfigError(f"--parity {model} is not a Hugging Face model folder: it has no config.json.")
    with tempfile.TemporaryDirectory(prefix="tora-parity-") as scratch:
        rows = list(_rows(Path(model).absolute(), Path(scratch)))
    if as_json:
        print(to_json([{**asdict(row), "holds": row.holds} for row in rows], indent=2))
    else:
        _print(rows)
    return 0 if all(row.holds for row in rows) else 1


def _rows(model: Path, scratch: Path) -> Iterator[ParityRow]:
    """All rows; each dtype and base has one engine."""
    from learner.learner import Learner

    prompts = _vision_prompts(model) if has_image_processor(model) else _text_prompts(model)
    for dtype in ("fp32", "bf16"):
        for quantize_base in (False, True):
            cfg = _config(model, scratch, dtype, quantize_base)
            engine = make_vllm_engine(cfg, gpu_share=0.5)
            try:
                for version, lora_type in enumerate(("lora", "dora")):
                    cfg = replace(cfg, model=replace(cfg.model, lora_type=lora_type))
                    yield _row(cfg, version, Learner(cfg), engine, prompts)
            finally:
                engine.close()


def _text_prompts(model: Path) -> list[Prompt]:
    tokenizer = load_tokenizer(model)
    return [Prompt(i, tuple(tokenizer.encode(text)), text, {}) for i, text in enumerate(_TEXTS)]


def _vision_prompts(model: Path) -> list[Prompt]:
    """Each has a text and images of noise."""
    processor, prompts = ImageProcessor(model), []
    for number, (sizes, text) in enumerate(zip(_IMAGES, _TEXTS, strict=False)):
        images = tuple(_noise(size) for size in sizes)
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        ids = processor.encode([{"role": "user", "content": parts}], images)
        prompts.append(Prompt(number, ids, text, {}, images))
    return prompts


def _noise(size: tuple[int, int]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise(size, 64).convert("RGB").save(file, "PNG")
    return file.getvalue()


def _config(model: Path, scratch: Path, dtype: str, quantize_base: bool) -> RunConfig:
    return RunConfig(
        name="parity",
        output_dir=str(scratch / f"{dtype}_{quantize_base}"),
        dtype="fp32" if dtype == "fp32" else "bf16",
        model=ModelConfig(
            path=str(model),
            quantize_base=quantize_base,
            train_vision="lora" if has_image_processor(model) else "none",
        ),
        rollout=RolloutConfig(engine="vllm", max_model_len=512),
        dataset={},
        rewards=[],
    )


def _row(cfg: RunConfig, version: int, learner: Any, engine: Engine, prompts: Sequence[Prompt]) -> ParityRow:
    _make_adapter(learner.model, version)
    learner.version = version
    engine.install(learner.snapshot())
    sampling = Sampling(_NEW_TOKENS)
    groups = engine.generate([SampleRequest(p.token_ids, _SAMPLES, p.id, sampling, p.images) for p in prompts])
    sampled = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    asked = [LogprobRequest(p.token_ids, tuple(c.token_ids.tolist()), p.images) for p, c in sampled]
    sequences = [
        (p, Rollout(c.token_ids, c.versions >= 0, c.logprobs, c.versions, StopReason.LENGTH, "", 0.0, {}), 0.0, i)
        for i, (p, c) in enumerate(sampled)
    ]
    batch = pack(OwnPrompts(), sequences, [1.0] * len(sequences))
    ours = {adapter: learner.logprobs(batch, adapter=adapter) for adapter in (True, False)}
    theirs = {adapter: np.concatenate(engine.logprobs(asked, adapter=adapter)) for adapter in (True, False)}
    gaps = [np.abs(a - b) for a, b in ((batch.actor_logprobs_N, ours[True]), *((theirs[k], ours[k]) for k in ours))]
    return ParityRow(
        ("q" if cfg.model.quantize_base else "") + cfg.model.lora_type,  # pyright: ignore[reportArgumentType]
        cfg.dtype,
        *(float(value) for gap in gaps for value in (gap.mean(), gap.max())),
        effect=float(np.abs(ours[True] - ours[False]).mean()),
        tokens=len(batch.targets_N),
    )


@torch.no_grad()
def _make_adapter(model: Decoder, seed: int) -> None:
    """Gives every adapter tensor random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained_parameters(model).items():
        noise = _NOISE_STD * torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.mul_(1 + noise) if "magnitude" in name else parameter.add_(noise)
    refresh(model)


def _print(rows: Sequence[ParityRow]) -> None:
    table = Table(title="vLLM against the learner: log-prob differences, mean and max", box=None, pad_edge=False)
    for heading in ("method", "dtype", "sampled", "adapter on", "adapter off", "adapter's effect", ""):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        pairs = ((row.sampled_mean, row.sampled_max), (row.on_mean, row.on_max), (row.off_mean, row.off_max))
        cells = [f"{mean:.1e} {largest:.1e}" for mean, largest in pairs]
        verdict = "ok" if row.holds else f"over {_MAX_GAP[row.dtype]:g}"
        table.add_row(row.method, row.dtype, *cells, f"{row.effect:.1e}", verdict)
    Console().print(table)
