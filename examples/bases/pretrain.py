"""Shared by the scripts that make the quick starts' bases: tokenizer, training loop and command line.

A base learns several styles of answer, one of which works the problem out. Early in training almost all answers are
worked, so that the base learns how; late in training few are, so that it rarely does. GRPO then discovers that working
the problem out pays. Held-out problems are never sampled.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Every digit and operator is a separate token: for addition this matters more than the model's size.
_WORDS = Regex(r"\d| ?[-+=] ?|\n|</?(?:answer|tool_call)>| ?[A-Za-z]+|: | ")
_WARMUP, _LEAST_LR = 30, 0.05
SWITCH = 0.8
"""Share of the steps after which worked answers become rare."""


def make_tokenizer(texts: Iterable[str], chat_template: str, extra_tokens: dict[str, str] | None = None) -> Any:
    """A byte-level BPE tokenizer trained on `texts`. `extra_tokens`: special tokens, by a processor's names for
    them."""
    extra = extra_tokens or {}
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(_WORDS, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[PAD, START, END, *extra.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=1024,
        **({"extra_special_tokens": extra} if extra else {}),
    )
    fast.chat_template = chat_template
    return fast


def pretrain(model: Any, loss_at: Callable[[int], torch.Tensor], steps: int, peak_lr: float) -> None:
    """Train with AdamW and a cosine schedule with warm-up. `loss_at(step)` samples a batch and returns its loss."""
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / _WARMUP) * max(_LEAST_LR, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    start = time.perf_counter()
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)


def answer_batch(prompts_B: list[list[int]], answers_B: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` [B, L], padded on the right; only answers have labels."""
    lengths_B = torch.tensor([len(p) + len(a) for p, a in zip(prompts_B, answers_B, strict=True)])
    tokens_BL = torch.full((len(prompts_B), int(lengths_B.max())), pad)
    labels_BL = torch.full_like(tokens_BL, -100)
    for row, (prompt, answer) in enumerate(zip(prompts_B, answers_B, strict=True)):
        end = len(prompt) + len(answer)
        tokens_BL[row, :end] = torch.tensor(prompt + answer)
        labels_BL[row, len(prompt) : end] = torch.tensor(answer)
    mask_BL = torch.arange(tokens_BL.shape[1])[None] < lengths_B[:, None]
    return {"input_ids": tokens_BL, "attention_mask": mask_BL.long(), "labels": labels_BL}


def make(description: str, train: Callable[[int], tuple[Any, Any]], accuracy: Callable[[Path, float], float]) -> None:
    """The command line. `train(seed)` returns the model and its tokenizer or processor; `accuracy(folder, temperature)`
    is measured on held-out problems."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; they affect rounding")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = train(args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"held-out accuracy: sampled {accuracy(args.out, 1.0):.3f}, greedy {accuracy(args.out, 0.0):.3f}")
