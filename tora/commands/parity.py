"""`tora doctor --parity MODEL`: check that vLLM and the learner give the same tokens the same log-probs.

The learner gets a random adapter with an effect large enough to measure and sends it to vLLM as in a run. vLLM samples
with it, then both score the samples, with the adapter and without. For a vision model the prompts have zero, one and
two images, and the vision tower and its mergers have adapters too. `ParityRow.holds` is the verdict.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tora.commands.parity_row import Method, ParityRow, Reference, compare
from tora.config.schema import ALL_LINEAR, ModelConfig, RolloutConfig, RunConfig
from tora.errors import ConfigError
from tora.launch.engines import INSTALL, make_vllm_engine
from tora.launch.servable import vllm_gap
from tora.models.load import empty_decoder
from tora.models.vision.processor import ImageProcessor, has_image_processor
from tora.reporting.strict_json import to_json
from tora.tasks.tokenizer import load_tokenizer
from tora.types import Prompt

_TEXTS = ("The capital of France is", "def add(a, b):\n", "Once upon a time", "2 + 2 =")
_IMAGES = ((), ((96, 64),), ((64, 128), (96, 64)))
"""(width, height) of each vision prompt's images, in pixels; the model's processor may enlarge them."""
_METHODS: dict[tuple[str, bool], Method] = {
    ("lora", False): "lora",
    ("dora", False): "dora",
    ("lora", True): "qlora",
    ("dora", True): "qdora",
}
"""By `lora_type` and `quantize_base`."""


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
        print(to_json([{**asdict(row), **row.bounds, "holds": row.holds} for row in rows], indent=2))
    else:
        _print(rows)
    return 0 if all(row.holds for row in rows) else 1


def _rows(model: Path, scratch: Path) -> Iterator[ParityRow]:
    """All rows; each dtype and base has one engine."""
    from learner.learner import Learner

    reference: Reference | None = None
    rounding = 0.0
    empty = empty_decoder(model, dtype=torch.float32, device=torch.device("cpu"))
    bases = (False,) if empty.gap(full=False, quantize=True) else (False, True)
    prompts = _vision_prompts(model) if has_image_processor(model) else _text_prompts(model)
    for dtype in ("fp32", "bf16"):
        for quantize_base in bases:
            cfg = _config(model, scratch, dtype, quantize_base)
            with_gains = replace(cfg, model=replace(cfg.model, lora_type="dora"))
            engine = make_vllm_engine(with_gains, gpu_share=0.5)
            try:
                for version, lora_type in enumerate(("lora", "dora")):
                    cfg = replace(cfg, model=replace(cfg.model, lora_type=lora_type))
                    learner, method = Learner(cfg), _METHODS[lora_type, quantize_base]
                    if dtype == "bf16" and not rounding and reference is not None:
                        rounding = reference.gap(learner)  # the first: of a base that is not quantised
                    row, scored = compare(method, engine, learner, prompts, version=version, rounding=rounding)
                    reference = reference or scored
                    yield row
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
    """With adapters in a tower where vLLM has them there. Raises ConfigError if it cannot serve the model at all."""
    cfg = RunConfig(
        name="parity",
        output_dir=str(scratch / f"{dtype}_{quantize_base}"),
        dtype="fp32" if dtype == "fp32" else "bf16",
        model=ModelConfig(
            path=str(model),
            lora_targets=ALL_LINEAR,
            quantize_base=quantize_base,
            train_vision="lora" if has_image_processor(model) else "none",
        ),
        rollout=RolloutConfig(engine="vllm", max_model_len=512),
        dataset={},
        rewards=[],
    )
    if vllm_gap(cfg) is not None:
        cfg = replace(cfg, model=replace(cfg.model, train_vision="none"))
    if gap := vllm_gap(cfg):
        raise ConfigError(f"--parity {model}: {gap}.")
    return cfg


def _print(rows: Sequence[ParityRow]) -> None:
    table = Table(title="vLLM against the learner: mean differences of log-probs", box=None, pad_edge=False)
    for heading in ("method", "dtype", "sampled", "adapter on", "bound", "off", "bound", "effect", "rounding", ""):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        on, off = (row.sampled_mean, row.on_mean, row.on_bound), (row.off_mean, row.off_bound)
        cells = [f"{value:.1e}" for value in (*on, *off, row.effect, row.rounding)]
        table.add_row(row.method, row.dtype, *cells, "ok" if row.holds else "FAILS")
    Console().print(table)
