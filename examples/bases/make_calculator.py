"""Make the tiny base of the tool quick start: `python examples/bases/make_calculator.py --out DIR`.

It learns two ways to multiply two-digit numbers: to call the calculator and repeat what it answers, and to guess. The
text between its turns is rendered as in a run, by `TurnTemplate`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from pretrain import SWITCH, make, make_tokenizer, pretrain
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from turns import CHAT_TEMPLATE, answered, batch_of, conversation, next_turns, opened

from tora.environments.template import TurnTemplate
from tora.environments.tools import parse_hermes, tool_schemas
from tora.tasks.calculator import calculate, calculator, draw, question_of

SCHEMAS = tool_schemas(None, ["tora.tasks.calculator.calculate"])
CALLS_EARLY, CALLS_LATE = 0.9, 0.3
STEPS, BATCH, PEAK_LR = 400, 32, 4e-3


def make_model(tokenizer: Any) -> Any:
    """To copy digits takes little."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=2,
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


def call_text(factors: tuple[int, int]) -> str:
    call = {"name": "calculate", "arguments": {"expression": f"{factors[0]} * {factors[1]}"}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def answer_text(product: int) -> str:
    return f"<answer>{product}</answer>"


def said(rng: random.Random, factors: tuple[int, int], calls_share: float) -> list[str]:
    """What the model says in its turns."""
    if rng.random() < calls_share:
        return [call_text(factors), answer_text(factors[0] * factors[1])]
    return [answer_text(rng.randint(121, 9801))]


def train(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def drawn(calls_share: float) -> tuple[tuple[int, int], list[str]]:
        factors = draw(rng, "train")
        return factors, said(rng, factors, calls_share)

    def tokens_of(factors: tuple[int, int], texts: list[str]) -> tuple[list[int], list[bool]]:
        between = [answered(template, "calculate", str(factors[0] * factors[1]))]
        return conversation(tokenizer, opened(template, question_of(factors)), texts, between)

    def loss_at(step: int) -> torch.Tensor:
        share = CALLS_EARLY if step < int(SWITCH * STEPS) else CALLS_LATE
        rows = [tokens_of(*drawn(share)) for _ in range(BATCH)]
        return model(**batch_of(rows, tokenizer.pad_token_id)).loss

    def text_of(factors: tuple[int, int], texts: list[str]) -> str:
        head = f"system\nTools: calculate(expression)\nuser\n{question_of(factors)}\nassistant\n"
        return head + f"\ntool\n{factors[0] * factors[1]}\n".join(texts)

    corpus = (drawn(CALLS_EARLY) for _ in range(2000))
    tokenizer = make_tokenizer((text_of(*each) for each in corpus), CHAT_TEMPLATE)
    template = TurnTemplate(tokenizer, SCHEMAS, [tokenizer.eos_token_id])
    model = make_model(tokenizer)
    pretrain(model, loss_at, STEPS, PEAK_LR)
    return model, tokenizer


@torch.no_grad()
def accuracy(folder: Path, temperature: float, num_problems: int = 256, seed: int = 0) -> float:
    """Share of held-out problems answered correctly with the tool at hand, with the weights in `folder` loaded as
    float32."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    template = TurnTemplate(tokenizer, SCHEMAS, [tokenizer.eos_token_id])
    rows = calculator(split="test", num_rows=num_problems)
    contexts = [opened(template, row["prompt"]) for row in rows]
    turns = next_turns(model, tokenizer, contexts, temperature)
    called = [i for i, (text, _) in enumerate(turns) if parse_hermes(text).calls]
    for i in called:
        (call, *_) = parse_hermes(turns[i][0]).calls
        try:
            result = calculate(**call.arguments)  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:  # whatever the model wrote
            result = str({"error": str(error)})
        contexts[i] += turns[i][1] + answered(template, "calculate", result)
    for i, turn in zip(called, next_turns(model, tokenizer, [contexts[i] for i in called], temperature), strict=True):
        turns[i] = turn
    return sum(answer_text(int(r["answer"])) == text for r, (text, _) in zip(rows, turns, strict=True)) / num_problems


if __name__ == "__main__":
    make("Make the tiny base of the tool quick start.", train, accuracy)
