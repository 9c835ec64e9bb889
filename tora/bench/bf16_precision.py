"""What bf16 costs: log-probs by the precision of the logits, and a DoRA gain by the size of LoRA's part; with `--step`,
what float32 logits cost a whole training step.

    python -m tora.bench.bf16_precision
    python -m tora.bench.bf16_precision --step smollm2/135M

Shape letters: N tokens, H hidden, V vocabulary, I inputs, O outputs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from learner.learner import Learner
from learner.logprobs import token_logprobs
from tora.adapters.dora import CachedDoRALinear
from tora.bench.learner import Workload, make_batch, make_config, make_prompt
from tora.bench.rows import Setting
from tora.bench.shapes import shape_names, write_random_model

_SHAPES = {"tiny": (256, 4096), "SmolLM2-135M": (576, 49152), "Qwen3-0.6B": (1024, 151936)}
"""Hidden and vocabulary sizes."""
_GAINS = (1.0005, 1.001, 1.002, 1.003, 1.005, 1.01, 1.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens whose log-probs are taken")
    parser.add_argument("--logit-std", type=float, default=5.0, help="standard deviation of the logits")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to time")
    parser.add_argument("--step", choices=shape_names(), metavar="SHAPES", help="time whole LoRA steps on these shapes")
    arguments = parser.parse_args()
    console = Console(width=120)
    if arguments.step:
        console.print(step_table(arguments.step, arguments.tokens, arguments.rounds))
        return
    console.print(head_table(arguments.tokens, arguments.logit_std, arguments.rounds))
    console.print(gain_table())


def head_table(num_tokens: int, logit_std: float, rounds: int) -> Table:
    """Mean |d log-prob| against float64, of tokens drawn from the distribution, and seconds of forward and backward."""
    table = Table(title="mean |d log-prob|, nat: rounded logits, float32 logits", box=None, title_justify="left")
    for heading in ("hidden x vocabulary", "T=1", "", "T=0.3", "", "time, median ratio", "lowest, highest"):
        table.add_column(heading, no_wrap=True)
    for name, (hidden_size, vocab_size) in _SHAPES.items():
        torch.manual_seed(0)
        hidden_NH = torch.randn(num_tokens, hidden_size).bfloat16().requires_grad_()
        head_VH = (logit_std / hidden_size**0.5 * torch.randn(vocab_size, hidden_size)).bfloat16()
        errors, ratios = [], []
        for temperature in (1.0, 0.3):
            logits_NV = hidden_NH.detach().double() @ head_VH.double().T / temperature
            exact_NV = logits_NV.log_softmax(1)
            targets_N = torch.multinomial(exact_NV.exp(), 1)[:, 0]
            for fp32 in (False, True):
                found_N, _ = token_logprobs(hidden_NH, head_VH, targets_N, temperature=temperature, fp32=fp32)
                error_N = found_N.detach().double() - exact_NV.gather(1, targets_N[:, None])[:, 0]
                errors.append(f"{error_N.abs().mean():.1e}")
        for _ in range(rounds):
            seconds = []
            for fp32 in (False, True):
                start = time.perf_counter()
                token_logprobs(hidden_NH, head_VH, targets_N, temperature=1.0, fp32=fp32)[0].sum().backward()
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[1] / seconds[0])
        spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
        table.add_row(f"{name}: {hidden_size} x {vocab_size}", *errors, f"{statistics.median(ratios):.2f}", spread)
    return table


def step_table(shapes: str, num_tokens: int, rounds: int) -> Table:
    """Seconds of a training step with rounded and with float32 logits, in turn, on the same random weights."""
    workload = Workload(tokens=num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(shapes, Path(folder), dtype="bfloat16")
        learner = Learner(make_config(path, Setting("lora"), dtype="bf16", rank=16, tokens=num_tokens))
        vocab_size = len(learner.model.head)
        batch = make_batch(workload, make_prompt(workload, path, vocab_size), vocab_size)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + rounds):
        for fp32, of_step in seconds.items():
            learner.model.lm_head_fp32 = fp32
            start = time.perf_counter()
            learner.step(batch)  # returns numbers, so a GPU has finished
            of_step.append(time.perf_counter() - start)
    rounded, exact = ([*of_step[1:]] for of_step in seconds.values())  # the first of each warms up
    ratios = [b / a for a, b in zip(rounded, exact, strict=True)]
    title = f"seconds of a LoRA step of {num_tokens} tokens on {shapes}, {learner.device.type}"
    table = Table(title=title, box=None, title_justify="left")
    for heading in ("rounded logits", "float32 logits", "median ratio", "lowest, highest"):
        table.add_column(heading, no_wrap=True)
    medians = (statistics.median(x) for x in (rounded, exact, ratios))
    table.add_row(*(f"{median:.3f}" for median in medians), f"{min(ratios):.2f}, {max(ratios):.2f}")
    return table


@torch.no_grad()
def gain_table() -> Table:
    """The gain that a layer's outputs show, by least squares against exact outputs of a gain of 1."""
    shares = (0.0, 0.001, 0.004, 0.04)
    title = "the gain that a bf16 DoRA layer shows, by LoRA's share of the output"
    table = Table(title=title, box=None, title_justify="left")
    for heading in ("gain", *(f"{share:.1%}" for share in shares)):
        table.add_column(heading, no_wrap=True)
    torch.manual_seed(0)
    x = torch.randn(4096, 256).bfloat16()
    base = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    layers = []
    for share in shares:
        layer = CachedDoRALinear(base, rank=4, scaling=1.0)
        layer.reset_adapter()
        nn.init.normal_(layer.lora_b)
        update_OI, weight_OI = layer.lora_b @ layer.lora_a, layer.weight.float()
        layer.lora_b.mul_(share * weight_OI.norm() / update_OI.norm())
        layers.append(layer)
    for gain in _GAINS:
        shown = []
        for layer in layers:
            layer.norm.copy_(layer.local_row_norm(layer.lora_a))
            layer.magnitude.copy_(gain * layer.norm)
            exact = x.double() @ (layer.weight.double() + layer.lora_b.double() @ layer.lora_a.double()).T
            shown.append(f"{(layer(x).double() * exact).sum() / exact.square().sum():.4f}")
        table.add_row(f"{gain:.4f}", *shown)
    return table


if __name__ == "__main__":
    main()
