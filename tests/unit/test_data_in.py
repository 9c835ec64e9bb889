"""Data as people bring it: file formats, folders, rows of other trainers, mixtures and filters."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from transformers import AutoTokenizer

from tora.config.load import load_config
from tora.errors import ConfigError
from tora.tasks.dataset import Rows, file_dataset
from tora.tasks.encode import encode_prompt
from tora.tasks.mixture import mixture
from tora.tasks.prompts import PromptStream
from tora.tasks.tokenizer import load_tokenizer, stop_token_ids

pytestmark = pytest.mark.usefixtures("datasets_cache")
BASE = Path(__file__).parents[2] / "configs" / "bases" / "chain_sum"
ROWS = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(5)]
FILE = "tora.tasks.dataset.file_dataset"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(rows: Rows) -> list[dict[str, Any]]:
    return [rows[i] for i in range(len(rows))]


# files


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = pandas.DataFrame(ROWS)
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    write(tmp_path / "rows.JSONL")
    write(tmp_path / "rows[1].jsonl")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write((tmp_path / "rows.JSONL").read_text())
    for name in ("rows.csv", "rows.tsv", "rows.JSONL", "rows[1].jsonl", "rows.jsonl.gz"):
        found = read(file_dataset(str(tmp_path / name)))
        assert [{**row, "answer": str(row["answer"])} for row in found] == ROWS, name


def test_a_pattern_and_saved_folders(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:])):
        write(tmp_path / f"{name}.jsonl", rows)
    assert read(file_dataset(str(tmp_path / "*.jsonl"))) == ROWS
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved.select(range(2))).save_to_disk(tmp_path / "two")
    assert read(file_dataset(str(tmp_path / "one"))) == ROWS
    assert read(file_dataset(str(tmp_path / "one"), split="train[1:3]")) == ROWS[1:3]
    assert read(file_dataset(str(tmp_path / "two"), split="test")) == ROWS[:2]
    assert read(file_dataset(str(tmp_path / "two"), split="train+test")) == [*ROWS, *ROWS[:2]]
    with pytest.raises(ConfigError, match='Unknown split "dev"'):
        file_dataset(str(tmp_path / "two"), split="dev")


def test_the_prompts_column_wins_over_one_named_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "1 + 2 =", "prompt": "wrong", "answer": "3"}])
    assert file_dataset(path, prompt_key="question")[0] == {"prompt": "1 + 2 =", "answer": "3"}


def test_verls_rows(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1 + 2 ="}]
    path = write(
        tmp_path / "rows.jsonl", [{"prompt": messages, "reward_model": {"ground_truth": "3", "style": "rule"}}]
    )
    for key in ("reward_model", "reward_model.ground_truth"):
        assert file_dataset(path, answer_key=key)[0]["answer"] == "3"
    with pytest.raises(ConfigError, match=r"row 0 has no reward_model.truth; it has ground_truth, style"):
        file_dataset(path, answer_key="reward_model.truth")[0]


def test_few_shot_turns_stand_between_system_prompt_and_prompt(tmp_path: Path) -> None:
    shots = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    path = write(tmp_path / "rows.jsonl")
    prompt = file_dataset(path, system_prompt="Be brief.", few_shot=shots)[3]["prompt"]
    question = {"role": "user", "content": ROWS[3]["prompt"]}
    assert prompt == [{"role": "system", "content": "Be brief."}, *shots, question]
    own = [{"role": "system", "content": "Own."}, question]
    path = write(tmp_path / "own.jsonl", [{"prompt": own, "answer": "6"}])
    assert file_dataset(path, few_shot=shots)[0]["prompt"] == [own[0], *shots, question]
    with pytest.raises(ConfigError, match=r"row 0 begins with a system message, and the dataset has a system_prompt"):
        file_dataset(path, system_prompt="Be brief.")[0]
    with pytest.raises(ConfigError, match=r"few_shot: message 0 of its prompt has no role; it has q"):
        file_dataset(path, few_shot=[{"q": "1"}])


# keep


def test_keep_by_pass_rate_and_length(tmp_path: Path) -> None:
    rates = [0.0, 0.1, 0.5, 0.9, None]
    path = write(tmp_path / "rows.jsonl", [{**row, "pass_rate": rate} for row, rate in zip(ROWS, rates, strict=True)])

    def kept(keep: Any) -> list[int]:
        return [int(row["answer"]) // 2 for row in read(file_dataset(path, keep=keep))]

    assert kept("0.1..0.9") == [1, 2, 3] and kept("..0.1") == [0, 1] and kept({"pass_rate": "0.2.."}) == [2, 3]
    assert kept({"answer": "..1"}) == [0, 1, 2, 3, 4] and kept({"prompt": "..7", "pass_rate": "0..0.5"}) == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"keep leaves no rows of .*: none has pass_rate in 0.95..1; .* 0 to 0.9"):
        kept("0.95..1")
    for wrong in ("0.9..0.1", "0.5", "a..b", "nan..1"):
        with pytest.raises(ConfigError, match=r"is not a range, such as 0.1..0.9"):
            kept(wrong)
    with pytest.raises(
        ConfigError, match=r"no column passrate \(keep\); it has prompt, answer, pass_rate; the nearest"
    ):
        kept({"passrate": "0..1"})


# mixtures


def test_a_mixture_has_the_weights_shares_everywhere_and_every_row(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "answer": "1"} for i in range(30)])
    write(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "answer": "1"} for i in range(4)])
    parts = [
        {"_component_": FILE, "path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("a", 3), ("b", 1))
    ]
    rows = mixture(parts)
    seen = [rows[i]["prompt"] for i in range(len(rows))]
    assert len(seen) == 40 and {*seen} == {*(f"a{i}" for i in range(30)), *(f"b{i}" for i in range(4))}
    for start in range(0, 40, 4):
        assert Counter(prompt[0] for prompt in seen[start : start + 4]) == {"a": 3, "b": 1}
    assert max(Counter(seen).values()) == 3  # b's rows repeat
    for wrong in ({"weight": 0}, {"weight": float("nan")}, {"weight": True}, {"weight": "2"}):
        with pytest.raises(ConfigError, match=r"datasets.1.weight=.* must be a number greater than 0"):
            mixture([parts[0], {**parts[1], **wrong}])
    for nothing in ([], {}, None):
        with pytest.raises(ConfigError, match=r"a list with at least one dataset"):
            mixture(nothing)  # type: ignore[arg-type]


# prompts


def test_without_shuffle_epochs_keep_the_rows_order(tokenizer) -> None:
    stream = PromptStream(ROWS, tokenizer, 64, shuffle=False)
    assert [stream.prompt(i).source for i in range(10)] == [row["prompt"] for row in ROWS] * 2


def test_sharegpt_rows_become_messages(tokenizer) -> None:
    turns = [("system", "Brief."), ("human", "1 + 1 ="), ("gpt", "2"), ("human", "2 + 2 =")]
    row = {"prompt": [{"from": who, "value": text} for who, text in turns]}
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, (_, text) in zip(roles, turns, strict=True)]
    prompt = PromptStream([row], tokenizer, 256).prompt(0)
    assert prompt.source == messages and prompt.token_ids == encode_prompt(tokenizer, messages)


def test_a_last_assistant_message_is_continued(tokenizer) -> None:
    messages = [{"role": "user", "content": "1 + 2 ="}, {"role": "assistant", "content": "1 + 2 = "}]
    open_ = tokenizer.decode(encode_prompt(tokenizer, messages[:1]))
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == open_ + "1 + 2 = "


def test_a_rows_own_template_variables(tokenizer, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "t.jinja").write_text(tokenizer.chat_template + "{% if enable_thinking is false %}7{% endif %}")
    mine = load_tokenizer(tmp_path / "model", str(tmp_path / "t.jinja"))
    rows = [{"prompt": "1", "chat_template_kwargs": {"enable_thinking": False, "other": None}}, {"prompt": "1"}]
    first, second = PromptStream(rows, mine, 64).sequential(2)
    assert mine.decode(first.token_ids) == mine.decode(second.token_ids) + "7"
    with pytest.raises(ConfigError, match=r"row 0: chat_template_kwargs.enable_thinking has no effect"):
        PromptStream(rows, tokenizer, 64).prompt(0)
    with pytest.raises(ConfigError, match=r"row 0: its chat_template_kwargs is of type bool"):
        PromptStream([{"prompt": "1", "chat_template_kwargs": True}], mine, 64).prompt(0)


TEMPLATES = {
    "{{ raise_exception('System role not supported') }}": "cannot render its prompt: System role not supported",
    "{{ messages[0].content + 1 }}": "cannot render its prompt: can only concatenate str",
    "{{ messages[0].name + 'x' }}": "cannot render its prompt: .*has no attribute 'name'",
    "{% if %}": "cannot render its prompt: Expected an expression",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_raises_is_quoted_with_the_row(template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=rf"dataset row 0: the chat template {TEMPLATES[template]}"):
        PromptStream([{"prompt": "1"}], tokenizer, 64).prompt(0)


WRONG_PROMPTS: list[tuple[Any, str]] = [
    (None, "its prompt is null"),
    ([], "a list without messages"),
    (7, "its prompt is of type int"),
    (["1 + 2 =", "3"], "message 0 of its prompt is of type str, expected role and content"),
    ([{"role": "user", "content": None}], "message 0 of its prompt, of the user, has no content"),
    ([{"role": "user"}], "message 0 of its prompt, of the user, has no content"),
    ([{"content": "1"}], "message 0 of its prompt has no role; it has content"),
    ([{"role": "user", "content": 3}], "has content of type int"),
    ([{"role": "user", "content": ["1"]}], "has a part of type str"),
    ([{"from": "human"}], "message 0 of its prompt, of the user, has no content"),
]


@pytest.mark.parametrize(("prompt", "words"), WRONG_PROMPTS, ids=lambda value: str(value)[:40])
def test_wrong_prompts_name_the_row(tokenizer, prompt: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset row 1: .*{words}"):
        PromptStream([ROWS[0], {"prompt": prompt}], tokenizer, 64).sequential(2)


WRONG_DATASETS: list[tuple[Any, str]] = [
    (None, "returns a NoneType"),
    ((row for row in ROWS), "returns a generator"),
    (pandas.DataFrame(ROWS), "returns a DataFrame, whose rows are not"),
    (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "returns a IterableDataset"),
    (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "returns a DatasetDict with train; return one"),
    ("a path", "returns a str"),
    ([], "has no rows"),
    (["1 + 1"], "returns rows of type str, expected dicts"),
]


@pytest.mark.parametrize(("rows", "words"), WRONG_DATASETS, ids=lambda value: type(value).__name__)
def test_what_is_no_dataset_is_refused(tokenizer, rows: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine.rows {words}"):
        PromptStream(rows, tokenizer, 64, source="mine.rows")


def test_numbers_as_rows_indices_are_plain(tokenizer) -> None:
    """`datasets` and lists take Python's integers; numpy's are converted."""
    assert PromptStream(datasets.Dataset.from_list(ROWS), tokenizer, 64).prompt(np.int64(3)).token_ids  # type: ignore[arg-type]


def test_a_token_without_an_embedding_is_named(tokenizer) -> None:
    mine = AutoTokenizer.from_pretrained(BASE)
    mine.add_tokens(["<x0>"], special_tokens=True)
    with pytest.raises(ConfigError, match=r"dataset row 0: its prompt has the token '<x0>' \(id \d+\).*embeddings for"):
        PromptStream([{"prompt": "1 <x0>"}], mine, 64, vocab_size=len(tokenizer)).prompt(0)


def test_the_end_token_may_stand_in_config_json_alone(tokenizer, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert {5, 6} <= set(stop_token_ids(tmp_path / "model", tokenizer))
    (tmp_path / "model" / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config.json' is no JSON"):
        stop_token_ids(tmp_path / "model", tokenizer)


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("{% if %}", "line 1: Expected an expression")])
def test_a_wrong_template_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ConfigError, match=rf"chat_template=.*t.jinja.*{words}"):
        load_tokenizer(BASE, str(tmp_path / "t.jinja"))


def test_data_beside_the_config_is_found_unless_the_working_directory_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (there, there / "more", here):
        folder.mkdir()
        write(folder / "rows.jsonl")
    part = "{{_component_: {0}, path: '{1}', weight: 1}}".format
    parts = f"[{part(FILE, 'more/*.jsonl')}, {part(FILE, 'none.jsonl')}]"
    shutil.copytree(BASE, there / "model")
    (there / "mine.yaml").write_text(
        f"extends: quickstart\nmodel: {{path: model}}\ndataset: {{_component_: {FILE}, path: rows.jsonl}}\n"
        f"eval: {{dataset: {{_component_: tora.tasks.mixture.mixture, datasets: {parts}}}, "
        f"more: {{a: {{_component_: {FILE}, path: rows.jsonl}}}}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    cfg = load_config("project/mine.yaml")
    assert cfg.eval is not None
    mixed = [part["path"] for part in cfg.eval.dataset["datasets"]]
    assert cfg.dataset["path"] == cfg.eval.more["a"]["path"] == str(there / "rows.jsonl")
    assert mixed == [str(there / "more/*.jsonl"), "none.jsonl"], "what is nowhere keeps its name for the message"
    assert cfg.model.path == str(there / "model")
    assert len(file_dataset(mixed[0])) == len(ROWS)
    monkeypatch.chdir(here)
    assert load_config("../project/mine.yaml").dataset["path"] == "rows.jsonl"


def test_a_template_file_takes_the_place_of_the_models(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}1 + {{ m['content'] }}{% endfor %}")
    tokenizer = load_tokenizer(BASE, str(tmp_path / "t.jinja"))
    assert tokenizer.decode(encode_prompt(tokenizer, "2 + 3 =")) == "1 + 2 + 3 ="
