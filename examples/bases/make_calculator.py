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

from tora.environments.template import TurnTemplate
from tora.environments.tools import parse_hermes, tool_schemas
from tora.tasks.calculator import calculate, calculator, draw, question_of

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %} {{ tool.function.name }}("
    "{{ tool.function.parameters.properties | join(', ') }}){% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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


def conversation(rng: random.Random, factors: tuple[int, int], calls_share: float) -> list[str]:
    """What the model says in its turns."""
    product = factors[0] * factors[1]
    if rng.random() < calls_share:
        return [call_text(factors), answer_text(product)]
    return [answer_text(rng.randint(121, 9801))]


def tokens_of(
    tokenizer: Any, template: TurnTemplate, factors: tuple[int, int], said: list[str]
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them the model says."""
    question = question_of(factors)
    ids = [*template.prompt(question), *template.opening(question, None)]
    spoken = [False] * len(ids)
    for number, text in enumerate(said):
        if number > 0:
            result = {"role": "tool", "name": "calculate", "content": str(factors[0] * factors[1])}
            between = template.answers([result])
            ids += between
            spoken += [False] * len(between)
        turn = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        ids += turn
        spoken += [True] * len(turn)
    return ids, spoken


def batch_of(rows: list[tuple[list[int], list[bool]]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` [B, L], padded on the right; only the model's own tokens have
    labels."""
    longest = max(len(ids) for ids, _ in rows)
    tokens_BL = torch.full((len(rows), longest), pad)
    labels_BL = torch.full_like(tokens_BL, -100)
    for row, (ids, spoken) in enumerate(rows):
        tokens_BL[row, : len(ids)] = torch.tensor(ids)
        labels_BL[row, : len(ids)] = torch.where(torch.tensor(spoken), torch.tensor(ids), -100)
    lengths_B = torch.tensor([len(ids) for ids, _ in rows])
    mask_BL = torch.arange(longest)[None] < lengths_B[:, None]
    return {"input_ids": tokens_BL, "attention_mask": mask_BL.long(), "labels": labels_BL}


def train(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def drawn(calls_share: float) -> tuple[tuple[int, int], list[str]]:
        factors = draw(rng, "train")
        return factors, conversation(rng, factors, calls_share)

    def loss_at(step: int) -> torch.Tensor:
        share = CALLS_EARLY if step < int(SWITCH * STEPS) else CALLS_LATE
        rows = [tokens_of(tokenizer, template, *drawn(share)) for _ in range(BATCH)]
        return model(**batch_of(rows, tokenizer.pad_token_id)).loss

    def text_of(factors: tuple[int, int], said: list[str]) -> str:
        head = f"system\nTools: calculate(expression)\nuser\n{question_of(factors)}\nassistant\n"
        return head + f"\ntool\n{factors[0] * factors[1]}\n".join(said)

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
    contexts = [[*template.prompt(r["prompt"]), *template.opening(r["prompt"], None)] for r in rows]
    said = _turns(model, tokenizer, contexts, temperature)
    called = [i for i, (text, _) in enumerate(said) if parse_hermes(text).calls]
    for i in called:
        (call, *_) = parse_hermes(said[i][0]).calls
        try:
            result = calculate(**call.arguments)  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:  # whatever the model wrote
            result = str({"error": str(error)})
        contexts[i] += said[i][1] + [*template.answers([{"role": "tool", "name": "calculate", "content": result}])]
    for i, turn in zip(called, _turns(model, tokenizer, [contexts[i] for i in called], temperature), strict=True):
        said[i] = turn
    return sum(answer_text(int(r["answer"])) == text for r, (text, _) in zip(rows, said, strict=True)) / num_problems


def _turns(model: Any, tokenizer: Any, contexts: list[list[int]], temperature: float) -> list[tuple[str, list[int]]]:
    """The next turn in each context: its text, and its ids with the stop token."""
    if not contexts:
        return []
    inputs = tokenizer.pad({"input_ids": contexts}, return_tensors="pt")
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    tokens_BL = model.generate(**inputs, max_new_tokens=64, **draws)[:, inputs["input_ids"].shape[1] :]
    turns = []
    for ids in tokens_BL.tolist():
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        turns.append((tokenizer.decode(ids[:end]), ids[: end + 1]))
    return turns


if __name__ == "__main__":
    make("Make the tiny base of the tool quick start.", train, accuracy)
