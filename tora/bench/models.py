"""The table of `docs/models.md`: what holds for each family that runs transformers' code, on a tiny random model.

    python -m tora.bench.models            # print the table
    python -m tora.bench.models --write    # put it into docs/models.md, row by row
    python -m tora.bench.models --vllm     # also serve each family with vLLM, which takes a minute each

A cell is the largest difference of a token's log-prob in float32, in nats: of `packed` from transformers' plain forward
of the same model, of an engine from the learner. Methods have an x where a training step runs and moves the policy.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.learner import Learner
from tora.adapters.inject import refresh, trained_parameters
from tora.adapters.targets import target_leaves
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.bench.families import FAMILIES, byte_tokenizer, write_family
from tora.bench.vision_families import VISION_FAMILIES, write_vision_family
from tora.config.schema import ALL_LINEAR, ModelConfig, RolloutConfig, RunConfig
from tora.errors import ConfigError
from tora.launch.engines import make_vllm_engine, shared_torch_engine
from tora.launch.in_process import check_in_process
from tora.launch.servable import vllm_gap as unservable
from tora.models.vision.processor import ImageProcessor
from tora.protocols import Engine
from tora.types import (
    Completion,
    MicroBatch,
    PolicySnapshot,
    Prompt,
    Rollout,
    SampleRequest,
    Sampling,
    StopReason,
    SyncReport,
)

_PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_BEGIN, _END = "<!-- begin: python -m tora.bench.models --write -->\n", "<!-- end -->\n"
_NOT_RUN, _REFUSED, _VLLM = "not run", "refused", "vLLM"
_NOTE = re.compile(r"- (.+?), ([\w ]+): (.+)\.")
"""A family, a column, and why that is refused."""
_METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_type": "lora"},
    "DoRA": {"lora_type": "dora_cache"},
    "NF4": {"lora_type": "dora_cache", "quantize_base": True},
    "full": {"lora_type": "full"},
}
_PROMPTS = [Prompt(i, tuple(range(20 + i, 44 + 5 * i)), "", {}) for i in range(3)]
"""Longer than the tiny models' windows."""


def make_config(folder: Path, engine: str, **model: Any) -> RunConfig:
    return RunConfig(
        name="models",
        output_dir=str(folder / "out"),
        dtype="fp32",
        optimizer={"_component_": "torch.optim.SGD", "lr": 0.1},
        model=ModelConfig(path=str(folder), implementation="transformers", lora_targets=ALL_LINEAR, **model),
        rollout=RolloutConfig(engine="vllm" if engine == "vllm" else "torch", max_model_len=256, kv_cache_gib=0.05),
        dataset={},
        rewards=[],
    )


def takes_images(name: str) -> bool:
    return name in VISION_FAMILIES


def write(folder: Path, name: str) -> Path:
    """Write a family's model with a tokenizer, which vLLM needs."""
    if takes_images(name):
        return write_vision_family(folder, name)
    byte_tokenizer(["<pad>", "<start>", "<end>"], pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    return write_family(folder, name)


def prompts_of(folder: Path, name: str) -> list[Prompt]:
    """Three prompts; of a model that takes images, one with none, one with one and one with two."""
    if not takes_images(name):
        return _PROMPTS
    processor, prompts = ImageProcessor(folder), []
    for number in range(3):
        images = tuple(_picture(40 + 8 * i, 24 + 8 * number) for i in range(number))
        words = {"type": "text", "text": f" and {number}?"}
        parts = [part for _ in images for part in ({"type": "image"}, words)] or [words]
        ids = processor.encode([{"role": "user", "content": parts}], images)
        prompts.append(Prompt(number, ids, "", {}, images))
    return prompts


def _picture(width: int, height: int) -> bytes:
    """A PNG of noise."""
    from PIL import Image

    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def _sequences(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> MicroBatch:
    """Each prompt with its completion, packed."""
    sequences = [
        (p, Rollout(c.token_ids, c.versions >= 0, c.logprobs, c.versions, StopReason.LENGTH, "", 0.0, {}), 1.0, i)
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]
    return pack(OwnPrompts(), sequences, [1.0] * len(sequences))


@torch.no_grad()
def packed_gap(folder: Path, name: str) -> float:
    """Of the learner's log-probs of packed documents, against transformers' plain forward of each."""
    import transformers

    images = takes_images(name)
    auto: Any = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    reference = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    processor = ImageProcessor(folder) if images else None
    prompts, ids = prompts_of(folder, name), np.arange(60, 84)
    nothing, versions = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int64)
    completions = [Completion(ids + 7 * i, nothing, nothing, versions, False) for i in range(len(prompts))]
    learner = Learner(make_config(folder, "torch", **_METHODS["LoRA"]))
    ours = learner.logprobs(_sequences(prompts, completions), adapter=False)
    theirs = []
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
        own = processor.inputs_for(whole, prompt.images) if processor is not None else {"input_ids": whole}
        logits = reference(**own).logits[0, len(prompt.token_ids) - 1 : -1]
        theirs.append(logits.log_softmax(1).gather(1, torch.from_numpy(completion.token_ids)[:, None])[:, 0])
    return float(np.abs(ours - torch.cat(theirs).numpy()).max())


@torch.no_grad()
def randomize_adapter(learner: Learner, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained_parameters(learner.model).items():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + noise) if "magnitude" in name else parameter.add_(noise)
    refresh(learner.model)


def engine_gap(engine: Engine | _Elsewhere, learner: Learner, version: int, prompts: Sequence[Prompt]) -> float:
    """Of the log-probs that an engine reports while it samples with a random adapter, against the learner's."""
    randomize_adapter(learner, version)
    learner.version = version
    engine.install(learner.snapshot())
    groups = engine.generate([SampleRequest(p.token_ids, 2, p.id, Sampling(24), p.images) for p in prompts])
    sampled = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    batch = _sequences(*zip(*sampled, strict=True))
    return float(np.abs(learner.logprobs(batch, adapter=True) - batch.actor_logprobs_N).max())


def torch_gap(folder: Path, name: str, method: str) -> float | str:
    """`engine_gap` of the torch engine; what refuses the method, if anything does."""
    cfg = make_config(folder, "torch", **_METHODS[method])
    try:
        learner = Learner(cfg, shares_model=True)
    except ConfigError as error:
        return str(error)
    return engine_gap(shared_torch_engine(cfg, learner), learner, 1, prompts_of(folder, name))


class _Elsewhere:
    """vLLM in a process of its own: it changes the classes that it takes from transformers, also for the learner."""

    def __init__(self, cfg: RunConfig) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (cfg,))

    def _call(self, method: str, *args: Any) -> Any:
        return self._pool.submit(_call, method, *args).result()

    def install(self, snapshot: PolicySnapshot) -> SyncReport:
        return self._call("install", snapshot)

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        return self._call("generate", requests)

    def close(self) -> None:
        self._call("close")
        self._pool.shutdown()


_engine: list[Engine] = []
"""Of a process that `_Elsewhere` started."""


def _start(cfg: RunConfig) -> None:
    _engine.append(make_vllm_engine(cfg, gpu_share=0.5))


def _call(method: str, *args: Any) -> Any:
    return getattr(_engine[0], method)(*args)


def vllm_gap(folder: Path, name: str) -> float | str:
    """The larger `engine_gap` of vLLM with LoRA and with DoRA; what refuses it, if anything does."""
    cfg, prompts = make_config(folder, "vllm", **_METHODS["DoRA"]), prompts_of(folder, name)
    if gap := unservable(cfg):
        return gap
    try:
        check_in_process(cfg)
        engine = make_vllm_engine(cfg, gpu_share=0.5)
    except ConfigError:
        engine = _Elsewhere(cfg)
    try:
        learners = [Learner(make_config(folder, "vllm", **_METHODS[m])) for m in ("LoRA", "DoRA")]
        return max(engine_gap(engine, learner, version, prompts) for version, learner in enumerate(learners))
    finally:
        engine.close()


@dataclass(frozen=True, slots=True)
class Row:
    """What holds for one family."""

    cells: list[str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Of what is refused, by column."""


def row(name: str, *, with_vllm: bool, folder: Path) -> Row:
    """One family's."""
    write(folder, name)
    gaps: dict[str, float | str] = {method: torch_gap(folder, name, method) for method in _METHODS}
    numbers = [gap for gap in gaps.values() if isinstance(gap, float)]
    methods = [_REFUSED if isinstance(gap, str) else "x" if gap < 1e-4 else f"{gap:.0e}" for gap in gaps.values()]
    served = _NOT_RUN
    if with_vllm:
        gaps[_VLLM] = vllm = vllm_gap(folder, name)
        served = _REFUSED if isinstance(vllm, str) else f"{vllm:.0e}"
    layers = f"`{' '.join(target_leaves(make_config(folder, 'torch').model))}`"
    title = VISION_FAMILIES[name].title if takes_images(name) else FAMILIES[name].title
    takes = "text, images" if takes_images(name) else "text"
    worst = max(numbers, default=math.nan)
    cells = [title, takes, layers, *methods, f"{packed_gap(folder, name):.0e}", f"{worst:.0e}", served]
    return Row(cells, {column: gap for column, gap in gaps.items() if isinstance(gap, str)})


def rows(names: Sequence[str], *, with_vllm: bool) -> Iterator[Row]:
    """Each family's."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="tora-models-") as folder:
            yield row(name, with_vllm=with_vllm, folder=Path(folder))


def table(found: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    head = ["family", "takes", "layers with adapters", *_METHODS, "packed", "torch", _VLLM]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *found])


def _notes(found: Row) -> dict[tuple[str, str], str]:
    """The reasons, by family and column."""
    return {(found.cells[0], column): reason for column, reason in found.reasons.items()}


def merged(page: str, found: Sequence[Row]) -> str:
    """The page with these rows in its table, in place of those of the same families, and with why something is refused.
    What is said of vLLM stays as it is on the page where it was not run."""
    before, _, rest = page.partition(_BEGIN)
    old, _, after = rest.partition(_END)
    lines = [line.strip("|").split("|") for line in old.splitlines() if line.startswith("|")][2:]
    kept = {cells[0]: cells for cells in ([cell.strip() for cell in line] for line in lines)}
    found_notes = [_NOTE.fullmatch(line) for line in old.splitlines()]
    notes = {(note[1], note[2]): note[3] for note in found_notes if note}
    for each in found:
        cells, family = each.cells, each.cells[0]
        has_vllm = cells[-1] != _NOT_RUN or family not in kept
        stale = {key for key in notes if key[0] == family and (has_vllm or key[1] != _VLLM)}
        notes = {key: reason for key, reason in notes.items() if key not in stale} | _notes(each)
        kept[family] = cells if has_vllm else [*cells[:-1], kept[family][-1]]
    order = [family.title for family in (*FAMILIES.values(), *VISION_FAMILIES.values())]
    kept = {title: kept[title] for title in order if title in kept}
    written = [(note, notes[note]) for title in order for note in notes if note[0] == title]
    reasons = "".join(f"- {family}, {column}: {reason}.\n" for (family, column), reason in written)
    return f"{before}{_BEGIN}\n{table([*kept.values()])}\n{reasons and reasons + chr(10)}{_END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tora.bench.models", description=__doc__)
    parser.add_argument("families", nargs="*", default=[*FAMILIES, *VISION_FAMILIES], help="which (default: all)")
    parser.add_argument("--vllm", action="store_true", help="serve each family with vLLM too")
    parser.add_argument("--write", action="store_true", help="put each row into docs/models.md as it is found")
    args = parser.parse_args()
    for found in rows(args.families, with_vllm=args.vllm):
        print(f"| {' | '.join(found.cells)} |", flush=True)
        for (family, column), reason in _notes(found).items():
            print(f"- {family}, {column}: {reason}.", flush=True)
        if args.write:
            _PAGE.write_text(merged(_PAGE.read_text(), [found]))


if __name__ == "__main__":
    main()
