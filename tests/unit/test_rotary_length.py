"""Rotary frequencies that transformers chooses by the longest sequence of a batch: one choice for a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import CPU, packed_logits
from families import make_family
from learners import config
from transformers import AutoModelForCausalLM

from learner.policy import build_policy
from tora.config.schema import RolloutConfig
from tora.errors import ConfigError

LONG, SHORT = torch.arange(600) % 250 + 3, torch.arange(40) + 3
"""One is beyond the 512 tokens at which the tiny Phi-4-mini's longrope changes."""


def logits(folder: Path, documents: list[torch.Tensor], max_prompt_tokens: int) -> torch.Tensor:
    cfg = config(
        folder,
        "lora",
        model={"lora_targets": "all-linear"},
        max_prompt_tokens=max_prompt_tokens,
        max_generated_tokens=100,
    )
    with torch.no_grad():
        return packed_logits(build_policy(cfg, CPU), documents)


@torch.no_grad()
def test_longrope_is_that_of_the_runs_longest_sequence(tmp_path: Path) -> None:
    """In a run that may pass the limit a short document is computed as in a batch of transformers with a long one,
    whatever it is packed with."""
    folder = make_family(tmp_path, "phi4-mini")
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    padded = torch.stack([LONG, torch.nn.functional.pad(SHORT, (0, len(LONG) - len(SHORT)))])
    long, short = reference(padded).logits
    short = short[: len(SHORT)]
    alone = reference(SHORT[None]).logits[0]
    assert (alone - short).abs().max() > 0.1, "the two sets of frequencies differ"
    torch.testing.assert_close(logits(folder, [SHORT], 412), alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits(folder, [SHORT], 413), short, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits(folder, [SHORT, LONG], 600), torch.cat([short, long]), atol=1e-4, rtol=1e-5)


def test_frequencies_that_grow_with_each_batch_are_refused_beyond_their_limit(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = make_family(tmp_path, "mistral", rope_parameters=rope, sliding_window=None)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(SHORT[None]).logits[0]
    torch.testing.assert_close(logits(folder, [SHORT], 412), expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"'dynamic'.* beyond 512 tokens.*longest sequence has 600"):
        build_policy(config(folder, "lora", rollout=RolloutConfig(max_model_len=600)), CPU)
    with pytest.raises(ConfigError, match=r"vLLM .*'dynamic'.*rollout.engine=torch"):
        build_policy(config(folder, "lora", rollout=RolloutConfig(engine="vllm", max_model_len=100)), CPU)
