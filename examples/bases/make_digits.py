"""Make the tiny Qwen3-VL base of the vision quick start: `python examples/bases/make_digits.py --out DIR`.

It learns two ways to add the digits in a picture: worked ("3 + 5 = 8", then the answer) and direct (only the answer).
"""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pretrain import SWITCH, answer_batch, make, make_tokenizer, pretrain
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tora.models.vision.processor import ImageProcessor
from tora.rewards.functions import answer_tag
from tora.tasks.digits import QUESTIONS, digits, draw, picture, values

IMAGE, VIDEO, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
SPECIAL_TOKENS = {
    "vision_bos_token": VISION_START,
    "vision_eos_token": VISION_END,
    "image_token": IMAGE,
    "video_token": VIDEO,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, MERGE = 16, 2
PIXELS = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
WORKED_EARLY, WORKED_LATE = 1.0, 0.3
STEPS, BATCH, PEAK_LR = 400, 64, 2e-3


def answer_text(rng: random.Random, indices: tuple[int, ...], worked_share: float) -> str:
    first, second = values(indices)
    work = f"{first} + {second} = {first + second}\n" if rng.random() < worked_share else ""
    return f"{work}<answer>{first + second}</answer>"


def make_processor(texts: list[str], chat_template: str = CHAT_TEMPLATE) -> Any:
    sizes: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=PIXELS, **sizes),
        tokenizer=make_tokenizer(texts, chat_template, SPECIAL_TOKENS),
        video_processor=Qwen3VLVideoProcessor(**sizes),
        chat_template=chat_template,
    )


def make_model(tokenizer: Any) -> Any:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 96,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    tokens = {"image": IMAGE, "video": VIDEO, "vision_start": VISION_START, "vision_end": VISION_END}
    ids: dict[str, Any] = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(t) for name, t in tokens.items()}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen3VLForConditionalGeneration(config)


def prompt_of(processor: ImageProcessor) -> list[int]:
    """The prompt's token ids, which are the same for every picture."""
    row = digits(num_rows=1)[0]
    return list(processor.encode(row["prompt"], row["images"]))


def vision_inputs(processor: ImageProcessor, tokens_BL: torch.Tensor, images: list[bytes]) -> dict[str, torch.Tensor]:
    """The vision inputs of transformers' model."""
    found = processor.pixels(images)
    return {
        "pixel_values": torch.from_numpy(found.patches_ND),
        "image_grid_thw": torch.from_numpy(found.grid_IT),
        "mm_token_type_ids": (tokens_BL == processor.image_token_id).long(),
    }


def train(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def pair(worked_share: float) -> tuple[bytes, str]:
        indices = draw(rng, "train", 2)
        return picture(indices), answer_text(rng, indices, worked_share)

    def loss_at(step: int) -> torch.Tensor:
        share = WORKED_EARLY if step < int(SWITCH * STEPS) else WORKED_LATE
        images, texts = zip(*(pair(share) for _ in range(BATCH)), strict=True)
        answers_B = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        batch = answer_batch([prompt] * BATCH, answers_B, tokenizer.pad_token_id)
        return model(**batch, **vision_inputs(reader, batch["input_ids"], list(images))).loss

    corpus = [pair(WORKED_EARLY)[1] for _ in range(500)]
    asked = "\n".join(QUESTIONS.values())
    processor = make_processor([f"user\n{asked}\nassistant\nsystem\n{answer}" for answer in corpus])
    tokenizer = processor.tokenizer
    model = make_model(tokenizer)
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        model.config.save_pretrained(folder)
        reader = ImageProcessor(Path(folder))
    prompt = prompt_of(reader)
    pretrain(model, loss_at, STEPS, PEAK_LR)
    return model, processor


@torch.no_grad()
def accuracy(folder: Path, temperature: float, num_problems: int = 256, seed: int = 0) -> float:
    """Share of held-out pairs added correctly, with the weights in `folder` loaded as float32."""
    torch.manual_seed(seed)
    reader, tokenizer = ImageProcessor(folder), AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [*digits(split="test", num_rows=num_problems)]
    tokens_BL = torch.tensor([prompt_of(reader)] * num_problems)
    vision = vision_inputs(reader, tokens_BL, [row["images"][0] for row in rows])
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    mask_BL = torch.ones_like(tokens_BL)
    tokens_BN = model.generate(input_ids=tokens_BL, attention_mask=mask_BL, **vision, max_new_tokens=20, **draws)
    texts = tokenizer.batch_decode(tokens_BN[:, tokens_BL.shape[1] :], skip_special_tokens=True)
    return sum(answer_tag(rows, texts, [row["answer"] for row in rows])) / num_problems


if __name__ == "__main__":
    make("Make the tiny base of the vision quick start.", train, accuracy)
