"""Tasks, datasets and prompt streams."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from tora.errors import ConfigError
from tora.tasks.chain_sum import PREFIX, chain_sum, is_held_out
from tora.tasks.dataset import file_dataset, hub_dataset
from tora.tasks.drawn import DrawnRows
from tora.tasks.encode import encode_prompt
from tora.tasks.gsm8k import gsm8k
from tora.tasks.prompts import PromptStream

pytestmark = pytest.mark.usefixtures("datasets_cache")
BASE = Path(__file__).parents[2] / "configs" / "bases" / "chain_sum"
ROWS = [{"prompt": f"{i} + {i} =", "answer": str(2 * i), "level": i % 3} for i in range(7)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# chain_sum


def test_chain_sum_never_shares_a_question_between_splits():
    train = {row["prompt"] for seed in range(3) for row in chain_sum("train", 2000, seed=seed)}
    test = {row["prompt"] for seed in range(3) for row in chain_sum("test", 500, seed=seed)}
    assert len(test) > 1000 and not train & test
    assert all(map(is_held_out, test)) and not any(map(is_held_out, train))


def test_chain_sum_answers_are_right_and_terms_in_range():
    rows = chain_sum("train", 500, min_terms=2, max_terms=4)
    expressions = [row["prompt"].removeprefix(PREFIX).removesuffix(" =") for row in rows]
    assert [str(eval(e)) for e in expressions] == [row["answer"] for row in rows]
    assert set(Counter(len(e.split()) // 2 + 1 for e in expressions)) == {2, 3, 4}


def test_chain_sum_is_the_same_in_every_process():
    code = "from tora.tasks.chain_sum import chain_sum; print(list(chain_sum('test', 3, seed=5)))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, cwd=BASE.parents[2], stdout=-1, text=True
        ).stdout
        for seed in "12"
    }
    assert outputs == {f"{list(chain_sum('test', 3, seed=5))}\n"}
    assert list(chain_sum("test", 3, seed=5)) != list(chain_sum("test", 3, seed=6))


@pytest.mark.parametrize("wrong", [{"split": "dev"}, {"num_rows": 0}, {"min_terms": 1}, {"min_terms": 6}])
def test_chain_sum_refuses(wrong: dict):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        chain_sum(**wrong)


# files and hub


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_file_dataset_reads_each_format(tmp_path: Path, ending: str):
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    else:
        write_jsonl(path, ROWS)
    rows = file_dataset(str(path))
    assert [rows[i] for i in range(len(rows))] == ROWS


def test_folder_splits_and_slices(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    assert len(file_dataset(str(tmp_path), split="test")) == 2
    assert len(file_dataset(str(tmp_path / "train.jsonl"), split="train[:3]")) == 3


def test_keys_and_system_prompt(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "1 + 1 =", "a": "2"}])
    row = file_dataset(path, prompt_key="q", answer_key="a", system_prompt="Be brief.")[0]
    assert row["answer"] == "2"
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 ="}]


def test_messages_come_back_as_written(tmp_path: Path):
    """Arrow unites the keys of all messages; the nulls that it fills in must not reach a chat template."""
    image = {"type": "image"}
    text = {"type": "text", "text": "What is this?"}
    messages = [{"role": "user", "content": [image, text]}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": messages, "answer": "2"}])
    assert file_dataset(path)[0]["prompt"] == messages


def test_dataset_errors_are_one_sentence(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{nonsense\n")
    (tmp_path / "rows.txt").write_text("a\n")
    cases = {
        "no column promt .*the nearest is prompt": lambda: file_dataset(path, prompt_key="promt"),
        "does not exist": lambda: file_dataset("nowhere.jsonl"),
        "no rows": lambda: file_dataset(str(tmp_path / "empty.jsonl")),
        "expected one of": lambda: file_dataset(str(tmp_path / "rows.txt")),
        "cannot be loaded": lambda: file_dataset(str(tmp_path / "broken.jsonl")),
        'Unknown split "dev"': lambda: file_dataset(path, split="dev"),
    }
    for message, call in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_hub_dataset_without_a_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="'nobody/nothing' cannot be loaded"):
        hub_dataset("nobody/nothing")


def test_gsm8k_from_a_local_file(tmp_path: Path):
    answer = "He has 1,000 + 234.\nSo <<1000+234=1234>>1234\n#### 1,234"
    path = write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "How many? ", "answer": answer}])
    row = gsm8k(path=path)[0]
    assert row["answer"] == "1234"
    assert row["prompt"].startswith("How many?\n") and "<answer>" in row["prompt"]
    with pytest.raises(ConfigError, match="question"):
        gsm8k(path=write_jsonl(tmp_path / "other.jsonl", ROWS))


# streams


def test_each_epoch_is_another_permutation_and_any_position_can_be_asked_first(tokenizer):
    def stream():
        return PromptStream(ROWS, tokenizer, 64, seed=3)

    epochs = [[stream().prompt(e * 7 + i).source for i in range(7)] for e in range(4)]
    assert all(sorted(epoch) == sorted(row["prompt"] for row in ROWS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    one = stream()
    backwards = [one.prompt(i) for i in reversed(range(28))]
    assert [p.source for p in reversed(backwards)] == [source for epoch in epochs for source in epoch]
    assert [p.id for p in backwards] == list(reversed(range(28)))
    assert [PromptStream(ROWS, tokenizer, 64, seed=4).prompt(i).source for i in range(7)] != epochs[0]


def test_prompt_carries_the_other_columns(tokenizer):
    prompt = PromptStream(ROWS, tokenizer, 64).prompt(0)
    row = next(row for row in ROWS if row["prompt"] == prompt.source)
    assert prompt.columns == {"answer": row["answer"], "level": row["level"]}


def test_sequential_is_in_order_and_its_ids_are_its_own(tokenizer):
    stream = PromptStream(ROWS, tokenizer, 64)
    held_out = stream.sequential(5)
    assert [p.source for p in held_out] == [row["prompt"] for row in ROWS[:5]]
    assert not {p.id for p in held_out} & {stream.prompt(i).id for i in range(100)}
    assert len(stream.sequential(100)) == 7


def test_token_ids_are_the_chat_templates(tokenizer):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1 ="}]
    text = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 + 1 =<|im_end|>\n<|im_start|>assistant\n"
    assert list(encode_prompt(tokenizer, messages)) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "1 + 1 =") == encode_prompt(tokenizer, messages[1:])


def test_without_a_chat_template_a_string_is_plain_text():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "1 + 1 =")) == "1 + 1 ="
    with pytest.raises(ConfigError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "1 + 1 ="}])


def test_stream_refuses_what_it_cannot_use(tokenizer):
    rows = [{"prompt": "1 + 1 ="}, {"prompt": "1 + " * 50}]
    with pytest.raises(ConfigError, match=r"row 1 .* 1\d\d tokens.*max_prompt_tokens=32"):
        PromptStream(rows, tokenizer, 32).sequential(2)
    with pytest.raises(ConfigError, match=r"row 0 has no column prompt.*nearest is promt"):
        PromptStream([{"promt": "1"}], tokenizer, 32).prompt(0)
    with pytest.raises(ConfigError, match="its prompt is of type int"):
        PromptStream([{"prompt": 1}], tokenizer, 32).prompt(0)
    with pytest.raises(ConfigError, match="no rows"):
        PromptStream([], tokenizer, 32)


def test_modules_import_without_torch():
    modules = (
        "tora.tasks.dataset, tora.rewards.rewarder, tora.tasks.gsm8k, tora.reporting.metrics, tora.reporting.summary"
    )
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=BASE.parents[2], check=True)


def test_base_is_small_and_names_no_machine():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 1 << 20
    for file in BASE.glob("*config.json"):
        assert not re.search(r'"/\w', file.read_text()), file


def test_rows_are_drawn_when_they_are_read_and_the_same_in_any_order() -> None:
    in_order = list(chain_sum("test", 20))
    rows = chain_sum("test", 20)
    assert [rows[i] for i in (19, 3, -20, 3)] == [in_order[i] for i in (19, 3, 0, 3)]
    assert rows[2:5] == in_order[2:5] and rows[30:] == [] and len(rows) == 20
    assert list(pickle.loads(pickle.dumps(chain_sum("test", 20)))) == in_order
    for index in (20, -21):
        with pytest.raises(IndexError):
            rows[index]
    drawn: list[int] = []
    counted = DrawnRows(9, random.Random(0), lambda rng: {"n": drawn.append(1)})
    assert (len(counted), drawn) == (9, []) and counted[2] and len(drawn) == 3
