"""`python -m tora.bench.packing`: a full gradient step on padded rows, on packed rows, and with shared prompts.

All variants are measured in turn, in one process and on the same rollouts. Shape letters: B sequences, L longest
sequence, H hidden, N response tokens, D head size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.learner import Learner
from learner.logprobs import token_logprobs
from tora.batching.batch import micro_batches
from tora.bench.learner import make_config
from tora.bench.rows import Setting, ratio
from tora.bench.shapes import write_random_model
from tora.models.attention import PLAIN, LayerAttention, PackedAttention, Scores, sdpa
from tora.models.base import Decoder
from tora.types import Group, Prompt, Rollout, StopReason, TrainBatch


class Causal:
    """Causal attention on padded rows [B, L, heads, D]. Padding is on the right, so causality hides it."""

    def at(self, layer: int) -> LayerAttention:
        return self

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores = PLAIN) -> torch.Tensor:
        assert scores.window is None, "measured on models without sliding windows"
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, scores).transpose(1, 2)


class PaddedLearner(Learner):
    """The baseline for packing: one row per sequence, padded on the right to the longest. Head and loss still process
    response tokens only."""

    def _logprobs(self, model: Decoder, x: Any, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows = PackedAttention(x.lengths_B)
        tokens_BL = x.tokens_T[rows.pad_BL].view(rows.shape)
        positions_BL = torch.arange(rows.shape[1], device=self.device).expand(rows.shape)

        def response_logprobs(hidden_BLH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, rows.unpad_T[x.response_N])
            return token_logprobs(hidden_NH, model.head, x.targets_N, temperature=temperature)

        return model(tokens_BL, positions=positions_BL, attend=Causal(), output_fn=response_logprobs)


def make_group(prompt_tokens: int, completion_tokens: Sequence[int], vocab_size: int) -> Group:
    rng = np.random.default_rng(0)

    def rollout(length: int) -> Rollout:
        ids, reward = rng.integers(0, vocab_size, length), float(rng.random())
        logprobs = np.full(length, -np.log(vocab_size), dtype=np.float32)
        versions, sampled = np.zeros(length, dtype=np.int64), np.ones(length, dtype=bool)
        return Rollout(ids, sampled, logprobs, versions, StopReason.STOP, "", reward, {"random": reward})

    prompt = Prompt(0, tuple(rng.integers(0, vocab_size, prompt_tokens).tolist()), "", {})
    return Group(prompt, tuple(rollout(length) for length in completion_tokens))


def make_batch(group: Group, *, share_prefix: bool) -> TrainBatch:
    """The whole group in one micro-batch."""
    micro = micro_batches(
        [group],
        normalize_advantages=True,
        normalization="token",
        max_generated_tokens=max(len(r.token_ids) for r in group.rollouts),
        capacity=1 << 30,
        share_prefix=share_prefix,
    )
    return TrainBatch(micro, 1.0)


def measure(title: str, steps: dict[str, tuple[Learner, TrainBatch]], rounds: int) -> None:
    """Print each variant's median seconds, and the median over rounds of its speed relative to the padded variant."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, (learner, batch) in steps.items():
            start = time.perf_counter()
            learner.step(batch)
            if learner.device.type == "cuda":
                torch.cuda.synchronize(learner.device)
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: samples[1:] for name, samples in seconds.items()}  # the first round warms up
    print(title)
    for name, samples in seconds.items():
        faster = ratio(seconds["padded"], samples)
        print(f"  {name:14} {statistics.median(samples):8.3f} s   {faster:5.2f} x as fast as padded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="small", help="a name of tora.bench.shapes")
    parser.add_argument("--group", type=int, default=16, help="completions per prompt")
    parser.add_argument("--completion", type=int, default=32, help="tokens each; the shared prompt has twice as many")
    parser.add_argument("--longest", type=int, default=96, help="tokens of the longest sequence in the uneven load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    with tempfile.TemporaryDirectory(prefix="tora-bench-") as scratch:
        weights = "bfloat16" if dtype == "bf16" else "float32"
        folder = write_random_model(args.shapes, Path(scratch), dtype=weights)
        cfg = make_config(folder, Setting("lora"), dtype=dtype, rank=8, tokens=1)
        packed, padded = Learner(cfg), PaddedLearner(cfg)
    vocab_size = packed.model.embedding.shape[0]

    group = make_group(2 * args.completion, [args.completion] * args.group, vocab_size)
    own, shared = make_batch(group, share_prefix=False), make_batch(group, share_prefix=True)
    title = f"{args.group} completions of {args.completion} tokens, a prompt of {2 * args.completion}"
    measure(title, {"padded": (padded, own), "packed": (packed, own), "shared prefix": (packed, shared)}, args.rounds)

    prompt = args.longest // 10
    lengths = np.linspace(0.2, 1, args.group) * args.longest
    uneven = make_group(prompt, [round(n) - prompt for n in lengths], vocab_size)
    own = make_batch(uneven, share_prefix=False)
    title = f"{args.group} sequences, uniform in [{lengths[0]:.0f}, {args.longest}] tokens, prompts of {prompt}"
    measure(title, {"padded": (padded, own), "packed": (packed, own)}, args.rounds)


if __name__ == "__main__":
    main()
