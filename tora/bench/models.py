"""The table of `docs/models.md`: what holds for each family that runs transformers' code, on a tiny random model.

    python -m tora.bench.models            # print the table
    python -m tora.bench.models --write    # put it into docs/models.md
    python -m tora.bench.models --vllm     # also serve each family with vLLM, which takes a minute each

A cell is the largest difference of a token's log-prob in float32, in nats: of `packed` from transformers' plain forward
of the same model, of an engine from the learner. Methods have an x where a training step runs and moves the policy.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.learner import Learner
from learner.logprobs import token_logprobs
from tora.adapters.inject import refresh, trained_parameters
from tora.adapters.targets import target_leaves
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.bench.families import FAMILIES, write_family
from tora.config.schema import ALL_LINEAR, ModelConfig, RolloutConfig, RunConfig
from tora.errors import ConfigError
from tora.launch.engines import make_vllm_engine, shared_torch_engine
from tora.launch.in_process import check_in_process
from tora.models.attention import PackedAttention
from tora.models.load import load_decoder
from tora.protocols import Engine
from tora.types import Completion, PolicySnapshot, Prompt, Rollout, SampleRequest, Sampling, StopReason, SyncReport

_PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_BEGIN, _END = "<!-- begin: python -m tora.bench.models --write -->\n", "<!-- end -->\n"
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


@torch.no_grad()
def packed_gap(folder: Path) -> float:
    """Of log-probs from packed documents, against transformers' plain forward of each."""
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    device = torch.device("cpu")
    model = load_decoder(folder, dtype=torch.float32, device=device, implementation="transformers")
    documents = [torch.tensor(prompt.token_ids) for prompt in _PROMPTS]
    tokens, lengths = torch.cat(documents), torch.tensor([len(document) for document in documents])
    places, targets = torch.cat([torch.arange(int(n)) for n in lengths]), tokens.roll(-1)

    def finish(hidden_1TH: torch.Tensor) -> torch.Tensor:
        found, _ = token_logprobs(hidden_1TH[0], model.head, targets, temperature=1.0, logit_map=model.logit_map)
        return found

    ours = model(tokens[None], positions=places[None], attend=PackedAttention(lengths), output_fn=finish)
    logits = torch.cat([reference(document[None]).logits[0] for document in documents])
    return float((ours - logits.log_softmax(1).gather(1, targets[:, None])[:, 0]).abs().max())


@torch.no_grad()
def randomize_adapter(learner: Learner, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained_parameters(learner.model).items():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + noise) if "magnitude" in name else parameter.add_(noise)
    refresh(learner.model)


def engine_gap(engine: Engine | _Elsewhere, learner: Learner, version: int) -> float:
    """Of the log-probs that an engine reports while it samples with a random adapter, against the learner's."""
    randomize_adapter(learner, version)
    learner.version = version
    engine.install(learner.snapshot())
    groups = engine.generate([SampleRequest(p.token_ids, 2, p.id, Sampling(24), p.images) for p in _PROMPTS])
    sampled = [(prompt, c) for prompt, group in zip(_PROMPTS, groups, strict=True) for c in group]
    sequences = [
        (p, Rollout(c.token_ids, c.versions >= 0, c.logprobs, c.versions, StopReason.LENGTH, "", 0.0, {}), 1.0, i)
        for i, (p, c) in enumerate(sampled)
    ]
    batch = pack(OwnPrompts(), sequences, [1.0] * len(sequences))
    return float(np.abs(learner.logprobs(batch, adapter=True) - batch.actor_logprobs_N).max())


def torch_gap(folder: Path, method: str) -> float | str:
    """`engine_gap` of the torch engine; what refuses the method, if anything does."""
    cfg = make_config(folder, "torch", **_METHODS[method])
    try:
        learner = Learner(cfg, shares_model=True)
    except ConfigError as error:
        return str(error)
    return engine_gap(shared_torch_engine(cfg, learner), learner, 1)


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


def vllm_gap(folder: Path) -> float:
    """The larger `engine_gap` of vLLM with LoRA and with DoRA."""
    cfg = make_config(folder, "vllm", **_METHODS["DoRA"])
    try:
        check_in_process(cfg)
        engine = make_vllm_engine(cfg, gpu_share=0.5)
    except ConfigError:
        engine = _Elsewhere(cfg)
    try:
        learners = [Learner(make_config(folder, "vllm", **_METHODS[m])) for m in ("LoRA", "DoRA")]
        return max(engine_gap(engine, learner, version) for version, learner in enumerate(learners))
    finally:
        engine.close()


def row(name: str, *, with_vllm: bool, folder: Path) -> list[str]:
    """One family's cells."""
    write_family(folder, name)
    gaps = {method: torch_gap(folder, method) for method in _METHODS}
    numbers = [gap for gap in gaps.values() if isinstance(gap, float)]
    methods = ["refused" if isinstance(gap, str) else "x" if gap < 1e-4 else f"{gap:.0e}" for gap in gaps.values()]
    vllm = f"{vllm_gap(folder):.0e}" if with_vllm else "not run"
    layers = f"`{' '.join(target_leaves(make_config(folder, 'torch').model))}`"
    worst = max(numbers, default=math.nan)
    return [FAMILIES[name].title, layers, *methods, f"{packed_gap(folder):.0e}", f"{worst:.0e}", vllm]


def table(names: Sequence[str], *, with_vllm: bool) -> str:
    """The table in Markdown."""
    head = ["family", "layers with adapters", *_METHODS, "packed", "torch", "vLLM"]
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="tora-models-") as folder:
            rows.append(row(name, with_vllm=with_vllm, folder=Path(folder)))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tora.bench.models", description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="which (default: all)")
    parser.add_argument("--vllm", action="store_true", help="serve each family with vLLM too")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/models.md")
    args = parser.parse_args()
    text = table(args.families, with_vllm=args.vllm)
    print(text, end="")
    if args.write:
        page = _PAGE.read_text()
        before, _, rest = page.partition(_BEGIN)
        _, _, after = rest.partition(_END)
        _PAGE.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


if __name__ == "__main__":
    main()
