"""`chat_template_kwargs`: variables of the model's chat template, such as Qwen3's switch for thinking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tora.config.load import load_config
from tora.errors import ConfigError
from tora.models.vision.processor import ImageProcessor
from tora.tasks.encode import as_messages, check_template, encode_prompt
from tora.tasks.prompts import RunPrompts

BASES = Path(__file__).resolve().parents[2] / "configs" / "bases"
SWITCH = "{%- if enable_thinking is defined and enable_thinking is false %}<no thinking>{%- endif %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The quick-start's base with a template that has Qwen3's switch, at the end of the prompt as there."""
    folder = tmp_path / "model"
    shutil.copytree(BASES / "chain_sum", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += SWITCH
    tokenizer.save_pretrained(folder)
    return folder


def prompts(model: Path, *overrides: str) -> RunPrompts:
    return RunPrompts(load_config("quickstart", [f"model.path={model}", "eval.num_prompts=4", *overrides]))


def test_training_and_held_out_prompts_have_the_variables(model: Path) -> None:
    plain, without = prompts(model), prompts(model, "chat_template_kwargs.enable_thinking=false")
    tokenizer = plain.tokenizer
    ending = tuple(tokenizer("<no thinking>", add_special_tokens=False)["input_ids"])
    for a, b in [(plain.at(7), without.at(7)), *zip(plain.held_out, without.held_out, strict=True)]:
        assert b.token_ids == a.token_ids + ending
        whole = tokenizer.apply_chat_template(
            as_messages(b.source), tokenize=True, add_generation_prompt=True, return_dict=True, enable_thinking=False
        )
        assert list(b.token_ids) == whole["input_ids"]


def test_null_and_other_values_are_the_templates_business(model: Path) -> None:
    plain = prompts(model)
    for override in ("chat_template_kwargs=null", "chat_template_kwargs.enable_thinking=true"):
        assert prompts(model, override).at(0).token_ids == plain.at(0).token_ids


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("chat_template_kwargs.enable_thinkng=false", "enable_thinkng has no effect: the model's chat template has no"),
        ("chat_template_kwargs.enable=false", "enable has no effect"),
        ("chat_template_kwargs=false", "chat_template_kwargs=false must hold names and values"),
    ],
)
def test_a_variable_that_the_template_lacks_is_an_error(model: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prompts(model, override)


def test_without_a_template_no_variable_has_a_place() -> None:
    check_template(None, {})
    with pytest.raises(ConfigError, match="needs a chat template"):
        check_template(None, {"enable_thinking": False})


def test_prompts_with_images_have_the_variables(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BASES / "digits", folder)
    file = next(f for f in (folder / "chat_template.json", folder / "chat_template.jinja") if f.exists())
    if file.suffix == ".json":
        file.write_text(json.dumps({"chat_template": json.loads(file.read_text())["chat_template"] + SWITCH}))
    else:
        file.write_text(file.read_text() + SWITCH)
    processor = ImageProcessor(folder)
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "1 + 1 ="}]}]
    plain, without = (processor.encode(messages, [], kwargs) for kwargs in (None, {"enable_thinking": False}))
    assert without[: len(plain)] == plain and len(without) > len(plain)


def test_the_qwen3_configs_do_not_think(model: Path) -> None:
    for name in ("qwen3/0.6B_lora_grpo_single_device", "qwen3/32B_full_grpo"):
        variables = load_config(name).chat_template_kwargs
        assert variables == {"enable_thinking": False}
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(encode_prompt(tokenizer, "?", variables)) > len(encode_prompt(tokenizer, "?"))
