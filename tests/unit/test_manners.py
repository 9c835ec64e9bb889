"""Manners of the command line: names of other trainers, keys as options, completion, pipes, copies, a deep look."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tora.cli import main
from tora.commands.completion import script
from tora.config.aliases import ALIASES
from tora.config.load import config_names, load_config
from tora.config.reference import entries

ROOT = Path(__file__).parents[2]
KEYS = {entry.key: entry for entry in entries()}
BASE = ROOT / "configs" / "bases" / "chain_sum"


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert main(argv) == code
    captured = capsys.readouterr()
    return captured.err.strip() if code else captured.out


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_leads_to_a_key_that_exists(name: str) -> None:
    ours = ALIASES[name][1]
    inside = [key for key, entry in KEYS.items() if entry.is_component] + ["chat_template_kwargs"]
    assert ours is None or ours in KEYS or ours.startswith(tuple(f"{key}." for key in inside))
    assert name not in KEYS, "a key of ours is not another trainer's"


def test_the_page_on_migration_and_the_aliases_agree() -> None:
    text = (ROOT / "docs" / "migrate.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    both = [(theirs, ours) for theirs, ours in rows if theirs in ALIASES]
    assert len(both) > 20 and all(ALIASES[theirs][1] == ours for theirs, ours in both)


SENTENCES = {
    ("num_generations=8",): "Unknown key num_generations; TRL's num_generations is grpo_samples here",
    ("lr=1e-5",): "Unknown key lr; other trainers' lr is optimizer.lr here",
    ("beta=0.04",): "TRL's beta is loss.kl_coeff here",
    ("max_completion_length=9",): "TRL's max_completion_length is max_generated_tokens here",
    ("logging_steps=1",): "TRL's logging_steps has no equal here",
    ("data.train_batch_size=4",): "verl's data.train_batch_size is batch_size here",
    ("actor_rollout_ref.rollout.n=4",): "verl's actor_rollout_ref.rollout.n is grpo_samples here",
    ("forward_batch_size=4",): "torchtune's forward_batch_size is micro_batch_tokens here",
    ("model.r=4",): "other trainers' r is model.lora_rank here",
    ("--num_steps", "3"): "There is no option --num_steps; write keys of the config as num_steps=3.",
    ("--model.lora_rank=4",): "write keys of the config as model.lora_rank=4.",
}


@pytest.mark.parametrize("words", SENTENCES, ids=" ".join)
def test_other_names_are_answered_with_ours(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("validate", "run"):
        sentence = said(capsys, command, "quickstart", *words)
        assert SENTENCES[words] in sentence and len(sentence.splitlines()) == 1


def test_help_knows_other_names_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "TRL's num_generations is grpo_samples here" in said(capsys, "help", "num_generations")


def test_run_without_a_config_and_with_one_as_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs a config, such as quickstart" in said(capsys, "run")
    assert "Unknown key x=1" in said(capsys, "run", "--config", "quickstart", "x=1")


def test_version_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in ((["--version"], "tora"), (["--help"], "validate --deep"), (["run", "--help"], "optimizer.lr")):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0 and words in capsys.readouterr().out


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" not in said(capsys, "validate", "nowhere")
    text = said(capsys, "validate", "quickstart", "x=1", "--debug")
    assert "Unknown key x=1" in text
    assert "Traceback" in said(capsys, "run", "nowhere", "--debug")


def test_every_config_has_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/tora"])
    monkeypatch.setenv("COLUMNS", "100")
    text = said(capsys, "ls", code=0)
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] != [] and {line.split()[0] for line in lines} == {*config_names()}
    assert all(len(line) <= 100 and len(line.split()) > 2 for line in lines)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m tora ls | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "0"


def test_cp_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    assert "mine.yaml exists; choose another name" in said(capsys, "cp", "quickstart", str(mine))
    assert said(capsys, "cp", "quickstart", str(mine), "-n", code=0).strip().endswith("is left as it is")
    assert mine.read_text() == "mine"


def test_a_config_extends_another_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nname: mine\n")
    assert load_config(str(tmp_path / "mine.yaml")).name == "mine"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tora", "r"], {"run"}),
        (["tora", "run", "quickstart_g"], {"quickstart_guess"}),
        (["tora", "run", "quickstart", "model.lora_ra"], {"model.lora_rank="}),
        (["tora", "help", "model.lora_ra"], {"model.lora_rank"}),
        (["tora", "completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _tora; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    text = script("bash", ["run", "validate", "ls"])
    done = subprocess.run(["bash", "-c", f"{text}\n{ask}"], capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == expected and done.stderr == ""


def test_other_shells() -> None:
    assert "bashcompinit" in script("zsh", ["run"]) and "__fish_use_subcommand" in script("fish", ["run"])


def test_a_file_of_the_users_hides_no_package(tmp_path: Path) -> None:
    (tmp_path / "learner.py").write_text("raise SystemExit('the wrong learner')")
    (tmp_path / "yaml.py").write_text("raise SystemExit('the wrong yaml')")
    command = [sys.executable, "-m", "tora", "validate", "quickstart"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "quickstart: OK\n", done.stderr


# validate --deep


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_cache: None) -> Path:
    (tmp_path / "deep_rewards.py").write_text(
        "def exact(completions, answer):\n    return [float(c == a) for c, a in zip(completions, answer)]\n"
        "def broken(completions, **columns):\n    return [columns['nothing']]\n"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": "2"}) + "\n")
    (tmp_path / "mine.yaml").write_text(
        "extends: quickstart\ndataset: {_component_: tora.tasks.dataset.file_dataset, path: rows.jsonl}\neval: null\n"
        "rewards: [deep_rewards.exact]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_a_deep_look_shows_the_first_prompt_and_its_scores(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "validate", "--deep", "mine.yaml", code=0)
    for words in ("mine.yaml: OK", "model: ", "1 + 1 =", "its columns: answer", "completion '2': exact 1"):
        assert words in text
    assert not (project / "outputs").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rewards=[deep_rewards.broken]", r"reward broken raised KeyError: 'nothing' (.*deep_rewards.py, line 4"),
        ("rewards=[no_such_module.f]", "there is no module no_such_module"),
        ("dataset.answer_key=gold", r"rows.jsonl has no column gold (answer_key); it has prompt, answer"),
        ("loss=no_such_module.Loss", "there is no module no_such_module"),
        ("model.path=nowhere", 'model.path="nowhere"'),
    ],
)
def test_a_deep_look_finds_what_a_run_would(
    project: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = said(capsys, "validate", "--deep", "mine.yaml", override)
    assert re.search(words.replace("(", r"\(").replace(")", r"\)"), sentence), sentence
    assert len(sentence.splitlines()) == 1


def test_an_unsupported_model_is_found(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(BASE, "model")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    assert "nonsense" in said(capsys, "validate", "--deep", "mine.yaml", "model.path=model")
