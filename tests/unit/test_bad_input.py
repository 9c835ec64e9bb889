"""What people get wrong, each answered in one sentence with the thing, the value and the remedy, and nothing written.

The command line is called in this process, and so is what a run does before its first step. More of the kind is in
`test_data_in.py`, `test_images_in.py` and `test_manners.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tora.adapters.peft_config import read_peft_config
from tora.cli import main
from tora.errors import ConfigError
from tora.models.load import load_decoder
from tora.rewards.rewarder import build_rewarder
from tora.run.checkpoints import Checkpoints
from tora.run.folder import held
from tora.tasks.dataset import file_dataset
from tora.tasks.tokenizer import load_tokenizer, stop_token_ids

BASE = Path(__file__).parents[2] / "configs" / "bases" / "chain_sum"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
LONGEST = 450
"""Characters: one or two sentences."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_cache: None) -> Path:
    """The working directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def check_sentence(sentence: str, words: str) -> None:
    assert re.search(words, sentence), sentence
    assert len(sentence.splitlines()) == 1 and len(sentence) <= LONGEST, sentence
    assert "Traceback" not in sentence and "object at 0x" not in sentence


# the command line and the config

CONFIG = {
    # commands
    "run": "needs a config, such as quickstart",
    "run nowhere": "There is no config nowhere; the nearest is",
    "run nowhere.yaml": "There is no config nowhere.yaml",
    "run quickstart x": "The override x is not of the form key=value",
    "run quickstart --num_steps 3": "There is no option --num_steps; write keys of the config as num_steps=3",
    "run lora_grpo_single_device": "needs --config CONFIG",
    "run lora_grpo_single_devic --config quickstart": "There is no recipe lora_grpo_single_devic; the nearest is",
    "run full_grpo_single_device --config quickstart": "needs model.lora_type=full, but the config has lora",
    "cp quickstar .": "There is no config quickstar",
    "cp quickstart a/b/c.yaml": "is not a folder; --make-parents creates it",
    "help lora_rank": "Unknown key lora_rank; the nearest is model.lora_rank",
    "validate batch_size=3": "Name at least one config",
    # keys and values
    "validate quickstart batch_sise=3": "Unknown key batch_sise=3; the nearest is batch_size",
    "validate quickstart lora_rank=3": "Unknown key lora_rank=3; the nearest is model.lora_rank",
    "validate quickstart model.lora_typ=dora": "Unknown key model.lora_typ",
    "validate quickstart model=x": 'model="x" must hold keys and values',
    "validate quickstart model.lora_type=qlora": 'model.lora_type="qlora" must be one of full, lora, dora, dora_cache',
    "validate quickstart dtype=fp16": 'dtype="fp16" must be one of bf16, fp32',
    "validate quickstart device=gpu": "must be one of auto, cpu, cuda",
    "validate quickstart batch_size=2.5": "batch_size=2.5 must be a whole number",
    "validate quickstart batch_size=many": 'batch_size="many" must be a whole number',
    "validate quickstart batch_size=true": "batch_size=true must be a whole number",
    "validate quickstart batch_size=0": "batch_size=0 must be at least 1",
    "validate quickstart batch_size=null": "batch_size=null must be a whole number",
    "validate quickstart grpo_samples=1": "grpo_samples=1 must be at least 2",
    "validate quickstart temperature=0": "temperature=0.0 must be greater than 0",
    "validate quickstart temperature=nan": "temperature=.* must be a finite number",
    "validate quickstart top_p=1.5": "top_p=1.5 must be at most 1",
    "validate quickstart seed=-1": "seed=-1 must be at least 0",
    "validate quickstart seed=99999999999999999999": "seed=99999999999999999999 must be at most",
    "validate quickstart num_threads=100000": "num_threads=100000 must be at most 4096",
    "validate quickstart async_rl=yes_please": 'async_rl="yes_please" must be true or false',
    "validate quickstart name=": "name=",
    "validate quickstart stop=x": 'stop="x" must be a list',
    "validate quickstart stop=['']": "must not hold an empty string",
    "validate quickstart shuffle=2": "shuffle=2 must be true or false",
    "validate quickstart overlong_prompts=cut": "must be one of drop, error, truncate_left",
    "validate quickstart chat_template_kwargs=[a]": "must hold names and values",
    "validate quickstart model.lora_targets=[lm_head]": "must not name lm_head",
    "validate quickstart model.lora_targets=[]": "must name at least one linear layer",
    "validate quickstart model.lora_targets=(": "is no regular expression",
    "validate quickstart model.lora_rank=0": "model.lora_rank=0 must be at least 1",
    "validate quickstart model.lora_dropout=1": "must be less than 1",
    "validate quickstart optimizer.lr=0": "optimizer.lr=0 must be a number greater than 0",
    "validate quickstart optimizer.lr=fast": 'optimizer.lr="fast" must be a number greater than 0',
    "validate quickstart optimizer=adam": 'optimizer="adam" must hold _component_ and its arguments',
    "validate quickstart lr_scheduler._component_=cosine": "must be a dotted path",
    "validate quickstart dataset=null": "dataset=null must hold _component_ and its arguments",
    "validate quickstart dataset._component_=tora.tasks.gsm8k.gsm9k": "does not exist; the nearest is",
    "validate quickstart dataset=tora.tasks.gsm8k": "is a module, not a callable",
    "validate quickstart dataset.colour=red": 'dataset.colour="red" is not an argument of',
    "validate quickstart loss=grpo": 'loss="grpo" must hold _component_',
    "validate quickstart loss=learner.loss.GRPOLos": "does not exist; the nearest is",
    "validate quickstart rewards=[]": "must name at least one reward",
    "validate quickstart rewards=math": 'rewards="math" must be a list',
    "validate quickstart rewards=[math]": 'rewards.0="math" must hold _component_',
    "validate quickstart rewards=[tora.rewards.mth_answer]": "does not exist; the nearest is tora.rewards.math_answer",
    "validate quickstart rewards.0.weight=heavy": "must be a finite number",
    "validate quickstart rewards.0.weight=0": "at least one weight other than 0",
    "validate quickstart rewards.7.weight=1": "Unknown key rewards.7",
    "validate quickstart rewards.0.pattern=x": "is not an argument of",
    "validate quickstart rollout.engine=sglang": "must be one of auto, vllm, torch",
    "validate quickstart async_rl=false rollout.num_workers=2": "rollout.num_workers=2 needs async_rl=true",
    "validate quickstart rollout.partial=8 stop=[x]": "needs rollout.partial=null",
    "validate quickstart prompt_process=true async_rl=false": "prompt_process=true needs async_rl=true",
    "validate quickstart rollout.update=in_flight async_rl=false": "needs async_rl=true",
    "validate quickstart rollout.max_model_len=5": "must be at least max_prompt_tokens",
    "validate quickstart rollout.refill_by=nothing": "is not one of the rewards",
    "validate quickstart num_mini_batches=99": "must be at most batch_size",
    "validate quickstart advantage=rloo": "needs normalize_advantages=false",
    "validate quickstart model.quantize_base=true model.lora_type=full": "freezes the base, but",
    "validate quickstart fsdp_cpu_offload=true": "needs learner_ranks of at least 2",
    "validate quickstart activation_offloading=true": "needs activation_checkpointing=full or selective",
    "validate quickstart eval.num_prompts=0": "eval.num_prompts=0 must be at least 1",
    "validate quickstart eval.stop=x": 'eval.stop="x" must be a list',
    "validate quickstart checkpoint.every=0": "checkpoint.every=0 must be at least 1",
    "validate quickstart tools=[calculate]": "must be a dotted path",
    "validate quickstart metric_logger=[wandb]": 'metric_logger.0="wandb" must hold _component_',
    "validate quickstart num_generations=8": "TRL's num_generations is grpo_samples here",
    "validate quickstart name=${nothing}": "nothing",
    # folders
    "run quickstart model.path=nowhere": 'model.path="nowhere" is not a folder',
    "run quickstart model.adapter_path=nowhere": 'model.adapter_path="nowhere" is not a folder',
}


@pytest.mark.parametrize("line", CONFIG)
def test_a_command_is_answered_in_one_sentence(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split(" ")) == 2
    captured = capsys.readouterr()
    check_sentence(captured.err.strip(), CONFIG[line])
    assert captured.out == "" and not any(Path.cwd().iterdir())


YAML = {
    "": "Missing key name",
    "- a": "must contain keys and values",
    "a: [": "mine.yaml cannot be read: line",
    "\tname: x": "mine.yaml cannot be read: line 1",
    "extends: nothing.yaml": 'extends="nothing.yaml" is not a file; the nearest is',
    "extends: mine.yaml": "extends itself",
    "name: x": "Missing key model",
    "extends: quickstart.yaml\nmodel: null": "model=null must hold keys and values",
    "extends: quickstart.yaml\nmodel: {path: 3}": "model.path=3 must be text",
}


@pytest.mark.parametrize("text", YAML, ids=repr)
def test_a_broken_file_is_answered_in_one_sentence(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(text)
    assert main(["validate", "mine.yaml"]) == 2
    check_sentence(capsys.readouterr().err.strip(), YAML[text])
    assert [file.name for file in Path.cwd().iterdir()] == ["mine.yaml"]


# model folders


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        found = {**json.loads((folder / name).read_text()), **fields}
        (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return change


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[3]]


def index_of_missing(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "holds no config.json"),
    "config cut off": (write("config.json", "{"), "config.json' is no JSON: .*; download it again"),
    "config a pointer": (write("config.json", POINTER), "config.json' is no JSON"),
    "config a list": (write("config.json", "[]"), "holds a list, expected names and values"),
    "no model_type": (edit("config.json", model_type=None), "has no model_type"),
    "unknown model_type": (edit("config.json", model_type="nonsense"), "'nonsense' of .* is not known to transformers"),
    "wrong size": (edit("config.json", hidden_size=64), "has shape .*, config.json asks for"),
    "odd value": (edit("config.json", hidden_size="many"), "config.json of .* cannot be used"),
    "quantised": (
        edit("config.json", quantization_config={"quant_method": "gptq"}),
        "its weights are quantised",
    ),
    "no weights": (remove("model.safetensors"), "holds no safetensors file"),
    "weights a pointer": (write("model.safetensors", POINTER), "is a pointer of Git LFS"),
    "weights empty": (write("model.safetensors", ""), "is empty; download it again"),
    "weights cut off": (cut("model.safetensors", 40000), "is no whole safetensors file"),
    "weights of text": (write("model.safetensors", "nonsense" * 9), "is no whole safetensors file"),
    "shard missing": (index_of_missing, "is missing, and the model's index names it"),
    "index broken": (write("model.safetensors.index.json", "{"), "is no JSON"),
    "tensor missing": (with_tensors(without_one), "lacks 1 tensors of its model"),
    "tensor unknown": (with_tensors(lambda t: t.update(odd=torch.zeros(1))), "tensor 'odd' .* does not belong"),
    "no tokenizer": (remove("tokenizer.json"), "holds no tokenizer"),
    "tokenizer a pointer": (write("tokenizer.json", POINTER), "the tokenizer of .* cannot be loaded"),
    "generation config": (write("generation_config.json", "{"), "generation_config.json' is no JSON"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_broken_model_folder_is_named(case: str, empty_folder: Path) -> None:
    folder = empty_folder / "model"
    shutil.copytree(BASE, folder)
    change, words = MODELS[case]
    change(folder)
    with pytest.raises(ConfigError) as caught:
        load_decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
        stop_token_ids(folder, load_tokenizer(folder))
    check_sentence(str(caught.value), words)


# adapters

PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["q_proj"]}
ADAPTERS: dict[str, tuple[str | None, str]] = {
    "none": (None, "holds no adapter_config.json"),
    "broken": ("{", "is no adapter config of PEFT"),
    "a list": ("[]", "is no adapter config of PEFT"),
    "no rank": (json.dumps({k: v for k, v in PEFT.items() if k != "r"}), "is no adapter config of PEFT: KeyError 'r'"),
    "odd rank": (json.dumps({**PEFT, "r": "many"}), "is no adapter config of PEFT"),
    "other kind": (json.dumps({**PEFT, "peft_type": "IA3"}), 'peft_type="IA3", and only LORA'),
    "bias": (json.dumps({**PEFT, "bias": "all"}), "trained biases"),
    "no targets": (json.dumps({**PEFT, "target_modules": []}), "has no target_modules"),
    "unknown field": (json.dumps({**PEFT, "novelty": 1}), "novelty=1, which Tora does not know"),
    "init": (json.dumps({**PEFT, "init_lora_weights": "pissa"}), "changes the base's weights too"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_broken_adapter_folder_is_named(case: str, empty_folder: Path) -> None:
    text, words = ADAPTERS[case]
    if text is not None:
        (empty_folder / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_peft_config(empty_folder)
    check_sentence(str(caught.value), words)


# data files

ROW = '{"prompt": "1", "answer": "2"}\n'
FILES: dict[str, tuple[str, str | bytes | None, dict[str, Any], str]] = {
    "missing": ("rows.jsonl", None, {}, "does not exist"),
    "empty": ("rows.jsonl", "", {}, "has no rows"),
    "kind": ("rows.txt", ROW, {}, "ends in '.txt', expected one of .jsonl"),
    "broken": ("rows.jsonl", "{nonsense\n", {}, "cannot be loaded"),
    "cut off": ("rows.jsonl", ROW + '{"prompt": "1', {}, "cannot be loaded"),
    "not parquet": ("rows.parquet", "nonsense", {}, "cannot be loaded"),
    "not gzip": ("rows.jsonl.gz", b"\x1f\x8bnonsense", {}, "cannot be loaded"),
    "not text": ("rows.csv", b"\xff\xfe\x00\x01\x02", {}, "cannot be loaded"),
    "column": ("rows.jsonl", ROW, {"prompt_key": "promt"}, r"no column promt \(prompt_key\); it has prompt, answer"),
    "answer": ("rows.jsonl", '{"prompt": "1"}\n', {}, r"no column answer .*answer_key=null is for data without"),
    "split": ("rows.jsonl", ROW, {"split": "dev"}, 'Unknown split "dev"'),
    "slice": ("rows.jsonl", ROW, {"split": "train[9:"}, "cannot be loaded"),
    "keep": ("rows.jsonl", ROW, {"keep": "0.9..0.1"}, "is not a range"),
    "keep column": ("rows.jsonl", ROW, {"keep": "0..1"}, r"no column pass_rate \(keep\); it has prompt, answer"),
    "keep all gone": ("rows.jsonl", ROW, {"keep": {"prompt": "5.."}}, "keep leaves no rows"),
    "few shot": ("rows.jsonl", ROW, {"few_shot": ["hi"]}, "few_shot: message 0 of its prompt is of type str"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_data_file_that_cannot_be_used_is_named(case: str) -> None:
    name, content, arguments, words = FILES[case]
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        file_dataset(name, **arguments)
    check_sentence(str(caught.value), words)


# rewards

REWARDS: dict[str, tuple[list[Any], str]] = {
    "none": ([], "rewards is empty"),
    "no component": ([{"weight": 1}], "lacks _component_"),
    "module": ([{"_component_": "no_such_module.f"}], "there is no module no_such_module"),
    "name": ([{"_component_": "tora.rewards.lenght"}], "lenght does not exist; the nearest is length"),
    "argument": ([{"_component_": "tora.rewards.length", "goal": 3}], "has no argument 'goal'"),
    "weight": ([{"_component_": "tora.rewards.length", "weight": "1"}], "the weight of .* is '1', expected a finite"),
    "twice": ([{"_component_": "tora.rewards.math_answer"}] * 2, "is used 2 times; give each reward a different"),
    "not callable": ([{"_component_": "json.__name__"}], "cannot be called"),
    "judge": ([{"_component_": "tora.rewards.llm_judge", "url": "x", "model": "m"}], "must begin with http"),
    "judge's arguments": ([{"_component_": "tora.rewards.llm_judge"}], "cannot be made: it raised TypeError"),
    "reward model": ([{"_component_": "tora.rewards.reward_model", "model": "nowhere"}], "'nowhere' cannot be loaded"),
}


@pytest.mark.parametrize("case", REWARDS)
def test_rewards_that_cannot_be_built_are_named(case: str) -> None:
    components, words = REWARDS[case]
    with pytest.raises(ConfigError) as caught:
        build_rewarder(components)
    check_sentence(str(caught.value), words)


# the run's folder and its checkpoints


def test_folders_that_no_run_can_have(empty_folder: Path) -> None:
    (empty_folder / "file").write_text("x")
    (empty_folder / "other").mkdir()
    (empty_folder / "other" / "thesis.tex").write_text("x")
    cases = {
        empty_folder / "file": "is a file. Choose a folder",
        empty_folder / "file" / "below": "cannot be written to",
        Path("/proc/tora"): "cannot be written to",
        empty_folder / ("x" * 300): "cannot be written to",
        empty_folder / "other": "holds files that no run of Tora wrote, such as 'thesis.tex'",
    }
    for folder, words in cases.items():
        with pytest.raises(ConfigError) as caught, held(folder, resumes=False):
            pass
        sentence = str(caught.value)
        assert re.search(words, sentence) and len(sentence.splitlines()) == 1, sentence
    assert (empty_folder / "other" / "thesis.tex").read_text() == "x"


def test_checkpoints_that_cannot_be_resumed(empty_folder: Path) -> None:
    checkpoints = Checkpoints(empty_folder / "checkpoints", 2)
    with pytest.raises(ConfigError) as caught:
        checkpoints.to_resume()
    check_sentence(str(caught.value), "holds no checkpoint")
    (empty_folder / "checkpoints" / "step_000002").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        checkpoints.to_resume()
    check_sentence(str(caught.value), "holds no intact checkpoint; step_000002 is damaged: manifest.json is missing")


def test_the_tables_are_large() -> None:
    assert sum(map(len, (CONFIG, YAML, MODELS, ADAPTERS, FILES, REWARDS))) + 7 >= 120
