"""Make the tiny base of the quick start of several turns: `python examples/bases/make_guess_number.py --out DIR`.

It learns two ways to guess a number: to halve what is left, as the answers tell, and to ignore the answers.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from make_calculator import make_model
from pretrain import SWITCH, make, make_tokenizer, pretrain
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import CHAT_TEMPLATE, answered, batch_of, conversation, next_turns, opened

from tora.environments.template import TurnTemplate
from tora.environments.tools import ToolCall, parse_hermes, tool_schemas
from tora.tasks.guess_number import PROMPT, GuessNumber, draw, guess_number

SCHEMAS = tool_schemas({"_component_": "tora.tasks.guess_number.GuessNumber"}, [])
GUESSES = 5
HALVES_EARLY, HALVES_LATE = 0.9, 0.2
STEPS, BATCH, PEAK_LR = 600, 32, 4e-3


def call_text(number: int) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'guess', 'arguments': {'number': number}})}\n</tool_call>"


def game(rng: random.Random, highest: int, secret: int, halves: bool) -> tuple[list[str], list[str]]:
    """What the model says in its turns, and what it is answered."""
    said, heard = [], []
    first, last = 1, highest
    for _ in range(GUESSES):
        number = (first + last) // 2 if halves else rng.randint(1, highest)
        said.append(call_text(number))
        heard.append("correct" if number == secret else "higher" if number < secret else "lower")
        if number == secret:
            break
        first, last = (number + 1, last) if number < secret else (first, number - 1)
    return [*said, "Done."], heard


def train(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def drawn(halves_share: float) -> tuple[int, list[str], list[str]]:
        highest, secret = draw(rng, "train")
        return highest, *game(rng, highest, secret, rng.random() < halves_share)

    def tokens_of(highest: int, said: list[str], heard: list[str]) -> tuple[list[int], list[bool]]:
        opening = opened(template, PROMPT, f" It is between 1 and {highest}.")
        return conversation(tokenizer, opening, said, [answered(template, "guess", word) for word in heard])

    def loss_at(step: int) -> torch.Tensor:
        share = HALVES_EARLY if step < int(SWITCH * STEPS) else HALVES_LATE
        rows = [tokens_of(*drawn(share)) for _ in range(BATCH)]
        return model(**batch_of(rows, tokenizer.pad_token_id)).loss

    def text_of(highest: int, said: list[str], heard: list[str]) -> str:
        head = f"system\nTools: guess(number)\nuser\n{PROMPT} It is between 1 and {highest}.\nassistant\n"
        return head + "\n".join(f"{turn}\ntool\n{word}" for turn, word in zip(said, heard, strict=False)) + said[-1]

    tokenizer = make_tokenizer((text_of(*drawn(HALVES_EARLY)) for _ in range(2000)), CHAT_TEMPLATE)
    template = TurnTemplate(tokenizer, SCHEMAS, [tokenizer.eos_token_id])
    model = make_model(tokenizer)
    pretrain(model, loss_at, STEPS, PEAK_LR)
    return model, tokenizer


@torch.no_grad()
def accuracy(folder: Path, temperature: float, num_problems: int = 256, seed: int = 0) -> float:
    """Share of held-out games that are won, with the weights in `folder` loaded as float32."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    template = TurnTemplate(tokenizer, SCHEMAS, [tokenizer.eos_token_id])
    rows = guess_number(split="test", num_rows=num_problems)
    games = [GuessNumber() for _ in rows]
    contexts = [opened(template, PROMPT, each.reset(**row)) for each, row in zip(games, rows, strict=True)]
    playing = [*range(num_problems)]
    for _ in range(GUESSES):
        turns = next_turns(model, tokenizer, [contexts[i] for i in playing], temperature)
        still = []
        for i, (text, ids) in zip(playing, turns, strict=True):
            calls = parse_hermes(text).calls
            if not calls or not isinstance(calls[0], ToolCall):
                continue
            try:
                answer = games[i].guess(**calls[0].arguments)
            except Exception as error:  # whatever the model wrote
                answer = str({"error": str(error)})
            contexts[i] += ids + answered(template, "guess", answer)
            still.append(i)
        playing = still
    return sum(each.get_reward() for each in games) / num_problems


if __name__ == "__main__":
    make("Make the tiny base of the quick start of several turns.", train, accuracy)
