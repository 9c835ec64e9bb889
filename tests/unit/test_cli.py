"""The command line: what reaches the run, what reaches torchtune, and how quickly and clearly mistakes are reported."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tora.cli import main
from tora.commands import torchtune
from tora.config.load import config_file, load_config
from tora.config.schema import RunConfig
from tora.errors import RolloutError
from tora.launch.signals import Stop

HEAVY = ("torch", "transformers", "ray", "vllm", "torchtune", "numpy", "rich")
LORA = ["lora_grpo_single_device", "--config", "qwen3/0.6B_lora_grpo_single_device"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Collects the configs that reach `tora.launch.launcher.run`, which reports runs of 13 steps as interrupted."""
    configs: list[RunConfig] = []

    def run(cfg: RunConfig, stop: Stop | None) -> bool:
        configs.append(cfg)
        return cfg.num_steps != 13

    monkeypatch.setitem(sys.modules, "tora.launch.launcher", SimpleNamespace(run=run))
    return configs


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with Qwen3-0.6B, and an empty working directory."""
    (tmp_path / "models/Qwen3-0.6B").mkdir(parents=True)
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("TORA_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "models"


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr that rejects a command, which exits with code 2 and writes nothing."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.endswith(".\n")
    assert not any(Path.cwd().iterdir())
    return err


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["ls"], 0),
        (["help"], 0),
        (["help", "rollout"], 0),
        (["help", "lora_rank"], 2),
        (["doctor", "--help"], 0),
        (["validate", "quickstart", "qwen3/0.6B_lora_grpo"], 0),
        (["validate", "quickstart", "batch_size=0"], 2),
        (["run", "quickstart", "model.lora_typ=dora"], 2),
        (["run", "lora_grpo_single_devic", "--config", "quickstart"], 2),
        (["cp", "quickstar", "."], 2),
        (["no-such-command"], 2),
    ],
)
def test_answers_at_once_and_without_heavy_imports(argv: list[str], code: int, tmp_path: Path) -> None:
    script = f"""
import sys
from tora.cli import main
try:
    code = main({argv!r})
except SystemExit as exit:  # argparse
    code = exit.code or 0
assert not set({HEAVY!r}) & set(sys.modules), sorted(sys.modules)
sys.exit(code)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())
    # CPU time, since wall time depends on what else the machine does
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.5


def test_python_m_tora(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tora", "run", "quickstart", "grpo_samples=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "grpo_samples=1 must be at least 2.\n" and not any(tmp_path.iterdir())


def test_run_config(launched: list[RunConfig], models: Path) -> None:
    assert main(["run", LORA[2], "async_rl=true"]) == 0
    assert main(["run", LORA[2], "num_steps=13"]) == 130
    assert launched[0].async_rl and launched[0].model.path == str(models / "Qwen3-0.6B")


def test_run_takes_a_recipe_and_options_as_torchtune_does(launched: list[RunConfig], models: Path) -> None:
    assert main(["run", *LORA, "model.lora_type=dora", "batch_size=4"]) == 0
    assert main(["run", "--nproc_per_node", "1", "full_grpo_distributed", "--config", "qwen3/0.6B_full_grpo"]) == 0
    assert main(["run", "--config", LORA[2], LORA[0], "num_steps=7"]) == 0
    assert [cfg.model.lora_type for cfg in launched] == ["dora", "full", "lora"]
    assert (launched[0].batch_size, launched[2].num_steps) == (4, 7)


RANKS = ["--nproc_per_node", "2", "lora_grpo_distributed", "--config", "qwen3/0.6B_lora_grpo"]


def test_several_ranks_start_as_processes(
    launched: list[RunConfig], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], int]] = []

    def run_ranks(words: list[str], count: int, stop: Stop | None) -> int:
        started.append((words, count))
        return 3

    monkeypatch.setitem(sys.modules, "tora.launch.local_ranks", SimpleNamespace(run_ranks=run_ranks))
    assert main(["run", *RANKS, "seed=3"]) == 3
    assert started == [(["-m", "tora", "run", "qwen3/0.6B_lora_grpo", "seed=3", "learner_ranks=2"], 2)]
    assert main(["run", *RANKS, "async_rl=true"]) == 0, "on Ray the ranks are Ray actors"
    assert launched[0].learner_ranks == 2


def test_a_rank_runs_and_knows_how_many_there_are(
    launched: list[RunConfig], models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", *RANKS]) == 0
    assert "must equal the 2 ranks" in refusal(capsys, "run", *RANKS, "--nproc_per_node", "3")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["full_grpo_single_device", "--config", "qwen3/0.6B_lora_grpo"], "needs model.lora_type=full"),
        (["lora_grpo_distributed", "--config", "qwen3/0.6B_full_grpo"], "other than full"),
        (["--nproc_per_node", "2", *LORA], "runs on one device"),
        (["--nproc_per_node", "0", "lora_grpo_distributed", "--config", "qwen3/0.6B_lora_grpo"], "learner_ranks=0"),
        (["lora_grpo_single_device"], "needs --config"),
        (["lora_grpo_single_devic", "--config", "quickstart"], "the nearest is lora_grpo_single_device"),
        (["quickstart", "seed"], "not of the form key=value"),
        (["qwen3/1.7B_lora_grpo"], "is not a folder"),
        (["nothing_here.yaml"], "nothing_here.yaml"),
    ],
)
def test_run_refuses(
    argv: list[str], words: str, launched: list[RunConfig], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "run", *argv)
    assert not launched


def test_unknown_options_are_not_taken_for_overrides(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["run", *LORA, "-x"], ["ls", "x=1"]):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_failed_run_is_one_sentence(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cfg: RunConfig, stop: Stop | None) -> bool:
        raise RolloutError("The worker is gone.")

    monkeypatch.setitem(sys.modules, "tora.launch.launcher", SimpleNamespace(run=run))
    assert main(["run", *LORA]) == 1
    assert capsys.readouterr().err == "The worker is gone.\n"


def test_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("extends: quickstart.yaml\nbatch_siz: 3\n")
    assert main(["validate", "quickstart", str(bad), "qwen3/0.6B_lora_grpo", "model.path=/none"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f'{n}: OK (model.path="/none" is not a folder)' for n in ("quickstart", LORA[2][:20])]
    assert err == f"{bad}: Unknown key batch_siz=3; the nearest is batch_size.\n"


def test_help_explains_a_key_and_a_section(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["help", "model.lora_rank"]) == 0
    one = capsys.readouterr().out
    assert one.startswith("model.lora_rank\n    a whole number, at least 1; default 8\n\n    Rank of the adapter.")
    assert max(map(len, one.splitlines())) <= 100
    assert main(["help", "model"]) == 0
    section = capsys.readouterr().out
    assert section.startswith("model\n    a section; required\n") and one in section and "model.path\n" in section
    assert "rollout" not in section.split("\n\n")[0]


def test_help_lists_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    titles = [block.partition("\n")[0].partition(":")[0] for block in blocks[:-1]]
    assert titles == ["Top level", "model", "rollout", "sync", "eval", "checkpoint"]
    assert blocks[5].split("\n")[1:] == ["    every, keep"]


def test_help_leads_from_arguments_to_their_component(capsys: pytest.CaptureFixture[str]) -> None:
    for key, component in {
        "loss.clip_low": "loss",
        "rewards.0.weight": "rewards",
        "eval.dataset.split": "eval.dataset",
    }.items():
        assert main(["help", key]) == 0
        assert capsys.readouterr().out.startswith(f"{component}\n    a ")


def test_help_names_the_nearest_key(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    assert refusal(capsys, "help", "lora_rank") == "Unknown key lora_rank; the nearest is model.lora_rank.\n"
    assert refusal(capsys, "help", "rollot") == "Unknown key rollot; the nearest is rollout.\n"


def test_ls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/tora"])
    assert main(["ls"]) == 0
    ours = capsys.readouterr().out
    assert re.search(r"^  llama3_1/8B_lora_grpo +8B, LoRA or DoRA, several GPUs$", ours, re.MULTILINE)
    assert "quickstart" in ours and "base/" not in ours and "finetune" not in ours
    monkeypatch.setattr(sys, "argv", ["/bin/tune"])
    assert main(["ls"]) == 0
    both = capsys.readouterr().out
    assert "lora_grpo_distributed                    llama3_1/8B_lora_grpo\n" in both
    assert "lora_finetune_single_device              llama2/7B_lora_single_device\n" in both


def test_cp(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = LORA[2]
    assert main(["cp", name, "."]) == 0
    assert main(["cp", name, "mine"]) == 0
    for copy in ("0.6B_lora_grpo_single_device.yaml", "mine.yaml"):
        assert Path(copy).read_text() == config_file(name).read_text()
    assert load_config("mine.yaml").model.path == str(models / "Qwen3-0.6B")
    assert main(["cp", "quickstart", "mine", "-n"]) == 0
    assert load_config("mine.yaml").name == "qwen3_0.6B_lora_grpo_single_device"
    assert main(["cp", "quickstart", "new/mine.yml"]) == 2
    assert main(["cp", "quickstart", "new/mine.yml", "--make-parents"]) == 0
    assert load_config("new/mine.yml").name == "quickstart"


@pytest.mark.parametrize(
    "argv",
    [
        ["download", "Qwen/Qwen3-VL-2B-Instruct", "--output-dir", "somewhere"],
        ["cat", "llama2/7B_full"],
        ["validate", "theirs.yaml"],
        ["cp", "llama2/7B_full", "."],
        ["cp", "lora_finetune_single_device", "."],
        ["run", "lora_finetune_single_device", "--config", "llama2/7B_lora_single_device", "batch_size=3"],
        ["run", "--nnodes", "1", "--nproc_per_node", "2", "full_finetune_distributed", "--config", "llama2/7B_full"],
        ["run", "my/recipe.py", "--config", "mine.yaml"],
    ],
)
def test_other_commands_go_to_torchtune(argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(
        "# a comment\nmodel:\n  # another\n  _component_: torchtune.models.llama2.llama2_7b\n"
    )
    delegated: list[list[str]] = []
    monkeypatch.setattr(torchtune, "delegate", delegated.append)
    assert main(argv) == 0
    assert delegated == [argv]


def test_download_reaches_the_hub(tmp_path: Path) -> None:
    script = f"""
import inspect, huggingface_hub
from pathlib import Path
real = inspect.signature(huggingface_hub.snapshot_download)
def fake(*args, **kwargs):
    call = real.bind(*args, **kwargs).arguments
    print("called", call["repo_id"], call["local_dir"])
    Path(call["local_dir"]).mkdir()
    return str(call["local_dir"])
huggingface_hub.snapshot_download = fake
from tora.cli import main
main(["download", "Qwen/Qwen3-VL-2B-Instruct", "--output-dir", {str(tmp_path / "m")!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"called Qwen/Qwen3-VL-2B-Instruct {tmp_path / 'm'}" in done.stdout


PROBE = """
import json, os, sys
tora = "tora" in sys.modules
import torchtune.modules  # fails without the fixes
with open(f"seen{os.environ.get('RANK', '')}.json", "w") as file:
    json.dump([__name__, tora, sys.argv[1:]], file)
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """A folder with a recipe that writes down what it sees."""
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


@pytest.mark.parametrize("words", [["probe.py"], ["-m", "probe"]])
def test_a_program_that_does_not_import_tora_has_the_fixes(words: list[str], probe: Path) -> None:
    """torchrun starts the ranks of torchtune's recipes as such programs."""
    subprocess.run([sys.executable, *words, "a=1"], cwd=probe, check=True)
    assert json.loads((probe / "seen.json").read_text()) == ["__main__", False, ["a=1"]]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--nproc_per_node", "2"]])
def test_torchtune_runs_a_recipe_with_the_fixes(options: list[str], probe: Path) -> None:
    (probe / "c.yaml").write_text("a: 1\n")
    command = [sys.executable, "-m", "tora", "run", *options, "probe.py", "--config", "c.yaml", "a=2"]
    subprocess.run(command, cwd=probe, check=True)
    seen = sorted(probe.glob("seen*.json"))
    assert len(seen) == (2 if options else 1)
    for file in seen:
        assert json.loads(file.read_text()) == ["__main__", not options, ["--config", "c.yaml", "a=2"]]
