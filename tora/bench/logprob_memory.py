"""`python -m tora.bench.logprob_memory`: peak memory of log-probs and their gradient, in chunks and with full logits.

Each variant runs in a separate process, with a bf16 head. Shape letters: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from learner.logprobs import token_logprobs
from tora.bench.memory import peak_bytes

Logprobs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def naive(hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The baseline: all logits in float32, then log_softmax and gather."""
    logits_NV = F.linear(hidden_NH, head_VH).float()
    return logits_NV.log_softmax(1).gather(1, targets_N[:, None])[:, 0]


def ours(hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """`learner.logprobs`, in chunks."""
    return token_logprobs(hidden_NH, head_VH, targets_N, temperature=1.0)[0]


VARIANTS: dict[str, Logprobs] = {"naive": naive, "ours": ours}


def measure(variant: str, args: argparse.Namespace) -> None:
    """Print the peak bytes in addition to the inputs, and seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden_NH = torch.randn(args.tokens, args.hidden, device=device).bfloat16().requires_grad_()
    head_VH = (0.02 * torch.randn(args.vocab, args.hidden, device=device)).bfloat16().requires_grad_(args.train_head)
    targets_N = torch.randint(args.vocab, (args.tokens,), device=device)

    def work() -> None:
        VARIANTS[variant](hidden_NH, head_VH, targets_N).sum().backward()

    start = time.perf_counter()
    peak = peak_bytes(device, work)
    print(peak, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--train-head", action="store_true", help="also compute the gradient of the head's weight")
    parser.add_argument("--variant", choices=VARIANTS, help="measure only this one, in this process")
    args = parser.parse_args()
    if args.variant:
        measure(args.variant, args)
        return
    peaks = {}
    for name in VARIANTS:
        command = [sys.executable, "-m", "tora.bench.logprob_memory", "--variant", name, *sys.argv[1:]]
        words = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        peaks[name], seconds = int(words[0]), float(words[1])
        print(f"{name:6} {peaks[name] / 2**30:6.2f} GiB  {seconds:6.1f} s")
    print(f"ratio  {peaks['ours'] / peaks['naive']:6.3f}")


if __name__ == "__main__":
    main()
