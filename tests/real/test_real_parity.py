"""vLLM, the torch engine, the learner and PEFT on a pretrained model: the same tokens have the same log-probs.

The reference is transformers and PEFT in float32. bf16 is judged by what it costs without any adapter, which is the
gap between transformers in bf16 and in float32, and by what the adapter does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hugging_face import HuggingFace
from torch_engines import engine_of
from transformers import AutoTokenizer

pytest.importorskip("vllm")

from learner.learner import Learner
from tora.adapters.inject import refresh, trained_parameters
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.config.load import load_config
from tora.config.schema import RunConfig
from tora.launch.engines import make_vllm_engine
from tora.protocols import Engine
from tora.types import Completion, LogprobRequest, Prompt, Rollout, SampleRequest, Sampling, StopReason

QUESTIONS = ("What is 3 + 4?", "Name the capital of France.", "Write a sentence about the sea.")
SAMPLES, NEW_TOKENS = 2, 32
MAX_GAP_FP32 = 1e-4
"""Mean over tokens, in nats."""
MAX_RATIO_BF16 = 1.5
"""Of a mean gap to what bf16 costs without an adapter."""
MAX_SHARE = 0.25
"""Of a mean gap to the adapter's mean effect."""


def config(model: Path, folder: Path, dtype: str, lora_type: str) -> RunConfig:
    changes = [f"model.path={model}", f"output_dir={folder}", f"dtype={dtype}", f"model.lora_type={lora_type}"]
    return load_config("smollm2/135M_sums", changes)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def vllm(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Engine]]:
    engine = make_vllm_engine(config(smollm2, tmp_path_factory.mktemp("vllm"), request.param, "dora"))
    yield request.param, engine
    engine.close()


@torch.no_grad()
def shake(learner: Learner, size: float = 0.02) -> None:
    """Gives the adapter an effect: relative noise on magnitudes, absolute noise on the rest."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained_parameters(learner.model).items():
        noise = size * torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + noise) if name.endswith("magnitude") else parameter.add_(noise)
    refresh(learner.model)


def prompts(model: Path) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    asked: Any = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
    return [Prompt(i, tuple(ids), QUESTIONS[i], {}) for i, ids in enumerate(asked)]


@dataclass(frozen=True)
class Samples:
    """Completions of one engine, and their log-probs in it as it sampled them, [N]."""

    pairs: list[tuple[Prompt, Completion]]

    @classmethod
    def of(cls, engine: Engine, prompts: Sequence[Prompt]) -> Samples:
        asked = [SampleRequest(prompt.token_ids, SAMPLES, prompt.id, Sampling(NEW_TOKENS)) for prompt in prompts]
        groups = engine.generate(asked)
        return cls([(p, completion) for p, group in zip(prompts, groups, strict=True) for completion in group])

    @property
    def requests(self) -> list[LogprobRequest]:
        return [LogprobRequest(p.token_ids, tuple(c.token_ids.tolist())) for p, c in self.pairs]

    @property
    def logprobs(self) -> np.ndarray:
        return np.concatenate([c.logprobs for _, c in self.pairs])

    def in_learner(self, learner: Learner, *, adapter: bool) -> np.ndarray:
        rollouts = [(prompt, _rollout(c), 0.0, i) for i, (prompt, c) in enumerate(self.pairs)]
        return learner.logprobs(pack(OwnPrompts(), rollouts, [1.0] * len(rollouts)), adapter=adapter)


def _rollout(c: Completion) -> Rollout:
    everything = np.ones(len(c.token_ids), bool)
    return Rollout(c.token_ids, everything, c.logprobs, c.versions, StopReason.LENGTH, "", 0.0, {})


def gap(a: np.ndarray, b: np.ndarray) -> float:
    assert np.isfinite(a).all() and np.isfinite(b).all() and a.shape == b.shape
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("lora_type", ["lora", "dora"])
def test_every_system_agrees(
    vllm: tuple[str, Engine], lora_type: str, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dtype, served = vllm
    cfg = config(smollm2, tmp_path, dtype, lora_type)
    learner = Learner(cfg)
    learner.version = 1 + ("lora", "dora").index(lora_type)
    shake(learner)
    learner.export(tmp_path / "adapter")
    exact, rounded = (HuggingFace(smollm2, tmp_path / "adapter", d) for d in (torch.float32, torch.bfloat16))
    served.install(learner.snapshot())
    for name, engine in (("vLLM", served), ("torch engine", engine_of(learner))):
        samples = Samples.of(engine, prompts(smollm2))
        asked = samples.requests
        on, off = exact.logprobs(asked, adapter=True), exact.logprobs(asked, adapter=False)
        cost, effect = gap(rounded.logprobs(asked, adapter=False), off), gap(on, off)
        gaps = {
            f"{name}, sampling": gap(samples.logprobs, on),
            f"{name}, scoring": gap(np.concatenate(engine.logprobs(asked, adapter=True)), on),
            f"{name}, base": gap(np.concatenate(engine.logprobs(asked, adapter=False)), off),
            "learner": gap(samples.in_learner(learner, adapter=True), on),
            "learner, base": gap(samples.in_learner(learner, adapter=False), off),
        }
        if dtype == "bf16":
            gaps["PEFT"] = gap(rounded.logprobs(asked, adapter=True), on)
        with capsys.disabled():
            figures = ", ".join(f"{system} {value:.2e}" for system, value in gaps.items())
            print(f"\n{dtype} {lora_type}, {len(on)} tokens: effect {effect:.2e}, bf16 costs {cost:.2e}; {figures}")
        bound = min(MAX_GAP_FP32 if dtype == "fp32" else MAX_RATIO_BF16 * cost, MAX_SHARE * effect)
        assert not [system for system, value in gaps.items() if not value <= bound], f"{gaps}, bound {bound}"
