"""Make the tiny base of the quick start with pictures: `python examples/bases/make_digits_lookup.py --out DIR`.

It learns two ways to answer which digit is somewhere in a picture too small to tell: to look closer, and to guess.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from make_digits import make_model, make_processor, vision_inputs
from pretrain import SWITCH, make, pretrain
from transformers import AutoModelForImageTextToText, AutoTokenizer
from turns import batch_of, conversation, next_turns

from tora.environments.content import Content, content_of
from tora.environments.template import TurnTemplate
from tora.environments.tools import ToolCall, parse_hermes, tool_schemas
from tora.models.vision.parts import encoded
from tora.models.vision.processor import ImageProcessor
from tora.tasks.digits import draw, values
from tora.tasks.digits_lookup import PLACES, DigitsLookup, digits_lookup, enlarged, overview, question_of

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %} {{ tool.function.name }}("
    "{{ tool.function.parameters.properties | join(', ') }}){% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMAS = tool_schemas({"_component_": "tora.tasks.digits_lookup.DigitsLookup"}, [])
LOOKS_EARLY, LOOKS_LATE = 1.0, 0.2
STEPS, BATCH, PEAK_LR = 400, 48, 2e-3


def call_text(place: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'look', 'arguments': {'place': place}})}\n</tool_call>"


def answer_text(digit: int) -> str:
    return f"<answer>{digit}</answer>"


def prompt_of(place: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question_of(place)}]}]


def answered(template: TurnTemplate, content: Content) -> list[int]:
    return [*template.answers([{"role": "tool", "name": "look", "content": content.parts}], content.images)]


def train(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def row(looks_share: float) -> tuple[tuple[list[int], list[bool]], list[bytes]]:
        """A conversation's ids, which of them the model says, and its pictures."""
        indices, asked = draw(rng, "train", len(PLACES)), rng.randrange(len(PLACES))
        source, small = prompt_of(PLACES[asked]), overview(indices)
        opening = [*template.prompt(source, [small]), *template.opening(source, None)]
        if rng.random() >= looks_share:
            return conversation(tokenizer, opening, [answer_text(rng.randrange(10))], []), [small]
        shown = Content([{"type": "image"}], (encoded(enlarged(indices[asked])),))
        said = [call_text(PLACES[asked]), answer_text(values(indices)[asked])]
        return conversation(tokenizer, opening, said, [answered(template, shown)]), [small, *shown.images]

    def loss_at(step: int) -> torch.Tensor:
        share = LOOKS_EARLY if step < int(SWITCH * STEPS) else LOOKS_LATE
        rows, pictures = zip(*(row(share) for _ in range(BATCH)), strict=True)
        batch = batch_of([*rows], tokenizer.pad_token_id)
        images = [image for each in pictures for image in each]
        return model(**batch, **vision_inputs(reader, batch["input_ids"], images)).loss

    asked = "\n".join(f"{question_of(place)}\nassistant\n{call_text(place)}\ntool\n" for place in PLACES)
    answers = "\n".join(answer_text(digit) for digit in range(10))
    processor = make_processor([f"system\nTools: look(place)\nuser\n{asked}{answers}"] * 50, CHAT_TEMPLATE)
    tokenizer = processor.tokenizer
    model = make_model(tokenizer)
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        model.config.save_pretrained(folder)
        reader = ImageProcessor(Path(folder))
    template = TurnTemplate(tokenizer, SCHEMAS, [tokenizer.eos_token_id], processor=reader)
    pretrain(model, loss_at, STEPS, PEAK_LR)
    return model, processor


@torch.no_grad()
def accuracy(folder: Path, temperature: float, num_problems: int = 256, seed: int = 0) -> float:
    """Share of held-out questions answered correctly, with the weights in `folder` loaded as float32."""
    torch.manual_seed(seed)
    reader, tokenizer = ImageProcessor(folder), AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    template = TurnTemplate(tokenizer, SCHEMAS, [tokenizer.eos_token_id], processor=reader)
    rows = [*digits_lookup(split="test", num_rows=num_problems)]
    pictures = [[*row["images"]] for row in rows]
    contexts = [
        [*template.prompt(row["prompt"], images), *template.opening(row["prompt"], None)]
        for row, images in zip(rows, pictures, strict=True)
    ]

    def turns_of(numbers: list[int]) -> list[tuple[str, list[int]]]:
        images = [image for i in numbers for image in pictures[i]]
        wanted = [contexts[i] for i in numbers]
        return next_turns(
            model, tokenizer, wanted, temperature, lambda tokens_BL: vision_inputs(reader, tokens_BL, images)
        )

    turns = turns_of([*range(num_problems)])
    called = []
    for i, (text, ids) in enumerate(turns):
        calls = parse_hermes(text).calls
        if not calls or not isinstance(calls[0], ToolCall):
            continue
        environment = DigitsLookup()
        environment.reset(**rows[i])
        try:
            shown = content_of(environment.look(**calls[0].arguments)) or Content("")
        except Exception as error:  # whatever the model wrote
            shown = Content(str({"error": str(error)}))
        contexts[i] += ids + answered(template, shown)
        pictures[i] += shown.images
        called.append(i)
    for i, turn in zip(called, turns_of(called), strict=True):
        turns[i] = turn
    return sum(answer_text(int(r["answer"])) == text for r, (text, _) in zip(rows, turns, strict=True)) / num_problems


if __name__ == "__main__":
    make("Make the tiny base of the quick start with pictures.", train, accuracy)
