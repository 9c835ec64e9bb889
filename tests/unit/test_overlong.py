"""Prompts that are too long: dropped, refused or cut, and what counts as too long."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actors.prompt_cursor import PromptCursor, made_at_once
from tora.config.load import configs_dir, load_config
from tora.errors import ConfigError, OverlongPrompt
from tora.tasks.encode import encode_prompt
from tora.tasks.overlong import OverlongRows, prompt_limit
from tora.tasks.prompts import PromptStream, RunPrompts
from tora.types import Prompt, RolloutState

LONG = "1 + " * 50
ROWS = [{"prompt": f"{n} + 1 ="} for n in range(3)] + [{"prompt": LONG}, {"prompt": "5 + 1 ="}, {"prompt": LONG}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(configs_dir() / "bases" / "chain_sum")


def taken(cursor: PromptCursor) -> Prompt:
    prompt = cursor.take()
    assert prompt is not None
    return prompt


def cursor_of(prompt_at: Callable[[int], Prompt], state: RolloutState | None = None) -> PromptCursor:
    return PromptCursor(made_at_once(prompt_at), state or RolloutState())


def test_a_dropped_prompt_costs_its_turn_only_and_is_named_once(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    cursor = cursor_of(PromptStream(ROWS, tokenizer, 32, overlong="drop").prompt)
    prompts = [taken(cursor) for _ in range(8)]
    assert sorted(p.source for p in prompts[:4]) == sorted(p.source for p in prompts[4:])
    assert LONG not in {p.source for p in prompts}
    assert len({p.id for p in prompts}) == 8
    length = len(encode_prompt(tokenizer, LONG))
    (said,) = caplog.messages
    assert f"has a prompt of {length} tokens, more than max_prompt_tokens=32: it is dropped" in said
    position, dropped = cursor.state(()).cursor, cursor.take_dropped()
    assert dropped == position - 8 and 2 <= dropped <= 4
    assert cursor.take_dropped() == 0


def test_a_resumed_run_does_not_meet_a_dropped_prompt_again(tokenizer) -> None:
    asked: list[int] = []
    stream = PromptStream(ROWS, tokenizer, 32, overlong="drop")

    def prompt_at(position: int):
        asked.append(position)
        return stream.prompt(position)

    cursor = cursor_of(prompt_at)
    first = [taken(cursor) for _ in range(4)]
    state = cursor.state(in_flight=[first[-1].id])
    before = set(asked)
    asked.clear()
    resumed = cursor_of(prompt_at, state)
    assert taken(resumed) == first[-1]
    taken(resumed)
    assert set(asked) & before == {first[-1].id}


def test_evaluation_takes_the_first_prompts_that_fit(tokenizer) -> None:
    held_out = PromptStream([{"prompt": LONG}, *ROWS], tokenizer, 32, overlong="drop").sequential(4)
    assert [p.source for p in held_out] == [ROWS[i]["prompt"] for i in (0, 1, 2, 4)]
    assert len(PromptStream(ROWS, tokenizer, 32, overlong="drop").sequential(100)) == 4


def test_a_dataset_of_overlong_prompts_ends_the_run(tokenizer) -> None:
    stream = PromptStream([{"prompt": LONG}, {"prompt": LONG}], tokenizer, 32, overlong="drop")
    with pytest.raises(ConfigError, match="every prompt of the dataset is too long: dataset row"):
        cursor_of(stream.prompt).take()


def test_error_names_row_length_and_limit(tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"dataset row 3 has a prompt of \d+ tokens, more than max_prompt_tokens=32"):
        PromptStream(ROWS, tokenizer, 32, overlong="error").sequential(6)


def test_truncate_left_keeps_the_last_tokens(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    held_out = PromptStream(ROWS, tokenizer, 32, overlong="truncate_left").sequential(6)
    assert held_out[3].token_ids == encode_prompt(tokenizer, LONG)[-32:]
    assert held_out[0].token_ids == encode_prompt(tokenizer, ROWS[0]["prompt"])
    (said,) = caplog.messages
    assert "it loses its first tokens" in said


def test_a_prompt_with_images_is_dropped_rather_than_cut(caplog: pytest.LogCaptureFixture) -> None:
    rows = OverlongRows("truncate_left", 4, num_rows=2)
    assert rows.fit(0, (1, 2, 3, 4), has_images=True) == (1, 2, 3, 4)
    with pytest.raises(OverlongPrompt):
        rows.fit(1, (1, 2, 3, 4, 5), has_images=True)
    assert "a prompt with images cannot be cut: it is dropped" in caplog.text
    with pytest.raises(OverlongPrompt):
        rows.check(1)


def _model(folder: Path, **changes: object) -> Path:
    base = configs_dir() / "bases" / "chain_sum"
    folder.mkdir()
    for file in base.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), **changes}))
    return folder


def test_prompt_and_completion_must_fit_the_model(tmp_path: Path) -> None:
    cfg = load_config("quickstart", ["max_prompt_tokens=100", "max_generated_tokens=40"])

    def on(folder: Path):
        return replace(cfg, model=replace(cfg.model, path=str(folder)))

    assert prompt_limit(on(_model(tmp_path / "long", max_position_embeddings=200))) == (100, None)
    limit, why = prompt_limit(on(_model(tmp_path / "short", max_position_embeddings=70)))
    assert (limit, why) == (30, "the 30 that max_generated_tokens=40 leaves of the model's 70")
    with pytest.raises(ConfigError, match="max_generated_tokens=40 leaves no room for a prompt: the model takes 40"):
        prompt_limit(on(_model(tmp_path / "none", max_position_embeddings=40)))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 60}
    scaled = _model(tmp_path / "yarn", max_position_embeddings=60, rope_scaling=yarn)
    assert prompt_limit(on(scaled)) == (100, None)
    prompts = RunPrompts(on(tmp_path / "short"))
    assert all(len(prompt.token_ids) <= 30 for prompt in prompts.first(4))
