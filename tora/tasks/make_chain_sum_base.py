"""Makes the tiny Qwen3 base that the quick start trains: `python -m tora.tasks.make_chain_sum_base --out DIR`.

It learns three ways to answer: worked (each partial sum on its own line, then the answer), direct (the answer alone)
and plain (a sentence without tags, which earns nothing). At first almost all answers are worked, so that it can add;
at last few are, so that it seldom shows its work. What GRPO finds is to show it. Held-out problems are never drawn.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tora.tasks.chain_sum import Problem, chain_sum, draw
from tora.tasks.rewards import answer_tag

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Digits and operators are tokens of their own: for adding, this matters more than the model's size.
WORDS = Regex(r"\d| ?[-+=] ?|\n|</?answer>| ?[A-Za-z]+|: | ")
WORKED_EARLY, WORKED_LATE, SWITCH = 0.9, 0.3, 0.8
"""Share of worked answers before and after this share of the steps."""
STEPS, BATCH, PEAK_LR, WARMUP = 500, 96, 2e-3, 30


def answer_text(rng: random.Random, problem: Problem, worked_share: float) -> str:
    style = rng.random()
    if style < worked_share:
        return "\n".join([*problem.worked(), f"<answer>{problem.answer}</answer>"])
    if style < worked_share + 0.15 * (1 - worked_share):
        return f"The answer is {problem.answer}."
    return f"<answer>{problem.answer}</answer>"


def make_tokenizer(texts: Iterator[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(WORDS, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: Any) -> Any:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def render(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def batch_loss(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, end-of-turn included."""
    prompts = [tokenizer(render(tokenizer, question))["input_ids"] for question, _ in pairs]
    answers = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer in pairs]
    lengths_B = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])
    tokens_BL = torch.full((len(pairs), int(lengths_B.max())), tokenizer.pad_token_id)
    labels_BL = torch.full_like(tokens_BL, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens_BL[row, :end] = torch.tensor(prompt + answer)
        labels_BL[row, len(prompt) : end] = torch.tensor(answer)
    mask_BL = torch.arange(tokens_BL.shape[1])[None] < lengths_B[:, None]
    return model(input_ids=tokens_BL, attention_mask=mask_BL.long(), labels=labels_BL).loss


def train(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def pair(worked_share: float) -> tuple[str, str]:
        problem = draw(rng, "train")
        return problem.question, answer_text(rng, problem, worked_share)

    corpus = (pair(WORKED_EARLY) for _ in range(2000))
    tokenizer = make_tokenizer(f"user\n{q}\nassistant\n{a}\nsystem\n" for q, a in corpus)
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / WARMUP) * max(0.05, 0.5 * (1 + math.cos(math.pi * s / STEPS)))
    )
    start = time.perf_counter()
    for step in range(STEPS):
        share = WORKED_EARLY if step < int(SWITCH * STEPS) else WORKED_LATE
        loss = batch_loss(model, tokenizer, [pair(share) for _ in range(BATCH)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)
    return model, tokenizer


@torch.no_grad()
def accuracy(folder: Path, temperature: float, num_problems: int = 256, seed: int = 0) -> float:
    """Share of held-out problems answered right; the weights are read back from `folder` as float32."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = chain_sum(split="test", num_rows=num_problems)
    prompts = [row["prompt"] for row in rows]
    inputs = tokenizer([render(tokenizer, p) for p in prompts], return_tensors="pt", padding=True)
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    tokens_BL = model.generate(**inputs, max_new_tokens=56, **draws)
    texts = tokenizer.batch_decode(tokens_BL[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer_tag(prompts, texts, [row["answer"] for row in rows])) / num_problems


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny base of the quick start.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; rounding depends on them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = train(args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"held-out accuracy: sampled {accuracy(args.out, 1.0):.3f}, greedy {accuracy(args.out, 0.0):.3f}")


if __name__ == "__main__":
    main()
