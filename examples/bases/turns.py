"""Shared by the bases of the quick starts with tools: conversations as token ids, and a model that continues them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tora.environments.content import Content
from tora.environments.template import TurnTemplate

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %} {{ tool.function.name }}("
    "{{ tool.function.parameters.properties | join(', ') }}){% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def opened(template: TurnTemplate, question: str, observation: str = "") -> list[int]:
    """The ids up to the first turn."""
    return [*template.prompt(question), *template.opening(question, Content(observation))]


def answered(template: TurnTemplate, tool: str, answer: str) -> list[int]:
    """The ids between two turns."""
    return [*template.answers([{"role": "tool", "name": tool, "content": answer}])]


def conversation(
    tokenizer: Any, opening: Sequence[int], said: Sequence[str], between: Sequence[Sequence[int]]
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation in which the model says `said`, with `between` in between, and which of them it
    says."""
    ids, spoken = [*opening], [False] * len(opening)
    for number, text in enumerate(said):
        if number > 0:
            ids += between[number - 1]
            spoken += [False] * len(between[number - 1])
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


def next_turns(
    model: Any,
    tokenizer: Any,
    contexts: list[list[int]],
    temperature: float,
    inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]] = lambda tokens_BL: {},
) -> list[tuple[str, list[int]]]:
    """The next turn in each context: its text, and its ids with the stop token. `inputs`: the
    model's others, from the padded ids [B, L]."""
    if not contexts:
        return []
    padded = tokenizer.pad({"input_ids": contexts}, return_tensors="pt")
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    prompts_BL = padded["input_ids"]
    tokens_BL = model.generate(**padded, **inputs(prompts_BL), max_new_tokens=64, **draws)[:, prompts_BL.shape[1] :]
    turns = []
    for ids in tokens_BL.tolist():
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        turns.append((tokenizer.decode(ids[:end]), ids[: end + 1]))
    return turns
