"""Make the tiny Qwen3 base of the quick start: `python examples/bases/make_chain_sum.py --out DIR`.

It learns three styles of answer: worked (one line per partial sum, then the answer), direct (only the answer) and plain
(a sentence without tags, which earns no reward).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from pretrain import SWITCH, answer_batch, make, make_tokenizer, pretrain
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tora.rewards.functions import answer_tag
from tora.tasks.chain_sum import Problem, chain_sum, draw

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORKED_EARLY, WORKED_LATE = 0.9, 0.3
STEPS, BATCH, PEAK_LR = 500, 96, 2e-3


def answer_text(rng: random.Random, problem: Problem, worked_share: float) -> str:
    style = rng.random()
    if style < worked_share:
        return "\n".join([*problem.worked(), f"<answer>{problem.answer}</answer>"])
    if style < worked_share + 0.15 * (1 - worked_share):
        return f"The answer is {problem.answer}."
    return f"<answer>{problem.answer}</answer>"


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
    """Mean cross-entropy over the answers' tokens, including end-of-turn."""
    prompts = [tokenizer(render(tokenizer, question))["input_ids"] for question, _ in pairs]
    answers = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer in pairs]
    return model(**answer_batch(prompts, answers, tokenizer.pad_token_id)).loss


def train(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def pair(worked_share: float) -> tuple[str, str]:
        problem = draw(rng, "train")
        return problem.question, answer_text(rng, problem, worked_share)

    def loss_at(step: int) -> torch.Tensor:
        share = WORKED_EARLY if step < int(SWITCH * STEPS) else WORKED_LATE
        return batch_loss(model, tokenizer, [pair(share) for _ in range(BATCH)])

    corpus = (pair(WORKED_EARLY) for _ in range(2000))
    tokenizer = make_tokenizer((f"user\n{q}\nassistant\n{a}\nsystem\n" for q, a in corpus), CHAT_TEMPLATE)
    model = make_model(tokenizer)
    pretrain(model, loss_at, STEPS, PEAK_LR)
    return model, tokenizer


@torch.no_grad()
def accuracy(folder: Path, temperature: float, num_problems: int = 256, seed: int = 0) -> float:
    """Share of held-out problems answered correctly, with the weights in `folder` loaded as float32."""
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


if __name__ == "__main__":
    make("Make the tiny base of the quick start.", train, accuracy)
