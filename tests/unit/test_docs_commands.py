"""Every command in README and docs works as typed: its program, config and options exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import (
    ROOT,
    Block,
    every_block,
    write_files,
)

from tora import cli
from tora.bench.shapes import shape_names
from tora.commands.help import explain
from tora.commands.recipes import RECIPES
from tora.commands.run import _check_recipe
from tora.config.load import config_file, load_config


def commands(text: str) -> list[list[str]]:
    """The words of each command, without comments and leading variables."""
    lines = text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [_without_variables(words) for words in split if words]


def _without_variables(words: list[str]) -> list[str]:
    return _without_variables(words[1:]) if re.fullmatch(r"[A-Z_]+=.*", words[0]) else words


def check(words: list[str]) -> None:
    """Raises an error unless the command works as typed. An unknown program is an error too: none goes unchecked."""
    program, rest = words[0], words[1:]
    if program.startswith("./"):
        check_script(program, rest)
        return
    assert program in CHECKS, f"no check for {program}: add one to CHECKS"
    CHECKS[program](rest)


def check_script(script: str, arguments: list[str]) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    if script == "./deploy/local.sh" and arguments:
        check_tora(["run", *arguments])
    if script == "./deploy/submit.sh" and arguments:
        check_tora(["run", *arguments, "async_rl=true"])  # the script adds it
    if script == "./deploy/test.sh" and arguments:
        check_pytest(arguments)
    if script == "./deploy/setup.sh":
        check_extras(arguments)


def check_tora(words: list[str]) -> None:
    if words[0] == "download":
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", words[1]) and words[2] == "--output-dir"
        return
    args = cli._parse(words)
    if words[0] == "run":
        ranks = [] if args.nproc_per_node is None else [f"learner_ranks={args.nproc_per_node}"]
        cfg = load_config(args.config or args.target, [*args.overrides, *ranks])
        if args.config:
            assert args.target in RECIPES
            _check_recipe(args.target, cfg)
    elif words[0] == "plan":
        load_config(args.config, args.overrides)
    elif words[0] == "validate":
        for name in args.configs:
            load_config(name)
    elif words[0] == "cp":
        config_file(args.name)
    elif words[0] == "help" and args.key:
        explain(args.key)
    elif words[0] == "eval" and args.config:
        config_file(args.config)
    elif words[0] == "bench" and args.config:
        assert args.config in shape_names()
    elif words[0] == "doctor" and args.parity:
        assert (ROOT / args.parity / "config.json").is_file()


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        if words[1] in ("venv", "pytest", "pip"):
            return
        if words[1] == "vllm.entrypoints.openai.api_server":  # what `vllm serve` runs
            check_vllm(["serve", *(word for word in words[2:] if word != "--model")])
            return
        source = importlib.util.find_spec(words[1])
        assert source is not None and source.origin is not None
        options = [word for word in words[2:] if word.startswith("--")]
        text = Path(source.origin).read_text()
        assert all(f'"{option}"' in text for option in options), options
        overrides = [word for word in words[2:] if "=" in word and not word.startswith("-")]
        load_config("quickstart", overrides)
    else:
        assert (ROOT / words[0]).is_file()


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        if match := re.fullmatch(r"\.\[(.+)\]", word):
            check_extras(match[1].split(","))
        else:
            assert word in ("-e", ".", "pre-commit"), word


def check_extras(extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= project["optional-dependencies"].keys()


def check_pytest(words: list[str]) -> None:
    files = [word for word in words if word.startswith("tests/")]
    assert all((ROOT / file).is_file() for file in files), files
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    if "-m" in words:
        assert words[words.index("-m") + 1] in [marker.partition(":")[0] for marker in markers]
    if "-k" in words:
        assert any(words[words.index("-k") + 1] in (ROOT / file).read_text() for file in files)


def check_ray(words: list[str]) -> None:
    if words[0] == "job":
        inner = words[words.index("--") + 1 :]
        assert words[:2] == ["job", "submit"] and inner[0] == "tora"
        check_tora(inner[1:])
    else:
        assert words[0] == "up" and (ROOT / words[1]).is_file()


def check_kubectl(words: list[str]) -> None:
    assert words[:2] == ["apply", "-f"] and (ROOT / words[2]).is_file()


def check_sbatch(words: list[str]) -> None:
    subprocess.run(["bash", "-n", ROOT / words[0]], check=True)
    check_tora(["run", *words[1:], "async_rl=true"])  # the script adds it


def check_docker(words: list[str]) -> None:
    assert words[0] == "build" and (ROOT / words[words.index("--file") + 1]).is_file()


def check_vllm(words: list[str]) -> None:
    """Checks options against the fields of vLLM's arguments, since importing vLLM takes too long for a unit test."""
    assert words[0] == "serve"
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    package = Path(spec.origin).parent
    files = [package / "engine/arg_utils.py", *package.glob("entrypoints/**/cli_args.py")]
    text = "".join(file.read_text() for file in files)
    for option in [word for word in words if word.startswith("--")]:
        assert option in text or re.search(rf"\b{option[2:].replace('-', '_')}:", text), option


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "tora": check_tora,
    "tune": check_tora,
    "python": check_python,
    "pip": check_pip,
    "pytest": check_pytest,
    "ray": check_ray,
    "kubectl": check_kubectl,
    "sbatch": check_sbatch,
    "docker": check_docker,
    "vllm": check_vllm,
}


@pytest.mark.parametrize("block", every_block("bash"), ids=str)
def test_commands_work_as_typed(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, block.page)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for words in commands(block.text):
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "tora run quickstrat",
        "tora run quickstart num_step=3",
        "tora fly quickstart",
        "tora bench nothing",
        "python -m tora.bench.nothing",
        "pip install -e '.[nothing]'",
        "./deploy/nothing.sh",
        "ray job submit --working-dir . -- tora run nothing",
        "sbatch deploy/slurm.sbatch quickstart nothing=1",
        "curl anywhere",
    ],
)
def test_a_wrong_command_is_caught(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises((Exception, SystemExit)):
        check(words)
