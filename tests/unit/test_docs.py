"""The documentation says what is there: its links, paths, names, keys, commands, configs, data and code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from learner.loss.objective import Terms
from learner.mismatch import mismatch
from tora import cli
from tora.bench.shapes import shape_names
from tora.commands.recipes import RECIPES
from tora.commands.run import _check_recipe
from tora.config.components import locate
from tora.config.load import config_file, load_config
from tora.config.schema import RunConfig
from tora.rewards.rewarder import build_rewarder
from tora.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
GENERATED = ("docs/config.md",)
"""Pages whose generator has tests of its own."""
WRITTEN = [page for page in PAGES if page.relative_to(ROOT).as_posix() not in GENERATED]
FENCE = re.compile(r"^```(\w*)[ ]?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("tora", "actors", "learner", "configs", "deploy", "docs", "tests", "examples", ".github", ".ci")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; `file` is the name that stands behind its language."""

    page: Path
    language: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.file or self.text.splitlines()[0][:40]}"


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [Block(page, *match.groups()) for match in FENCE.finditer(page.read_text())]
    return [block for block in found if not languages or block.language in languages]


def every_block(*languages: str) -> list[Block]:
    return [block for page in WRITTEN for block in blocks(page, *languages)]


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


# Pages, links, paths and names.


def test_the_index_lists_every_page_in_one_line() -> None:
    lines = (ROOT / "docs/README.md").read_text().splitlines()
    for page in DOCS:
        if page.name != "README.md":
            assert len([line for line in lines if f"]({page.name})" in line]) == 1, page.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)), target


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_paths_exist(page: Path) -> None:
    for span in code_spans(page):
        path = span.removeprefix("./").rstrip("/")
        if path.split("/")[0] in FOLDERS and re.fullmatch(r"[\w./-]+", path) and "NAME" not in path:
            assert (ROOT / path).exists() or path in METRICS, span


METRICS = {
    name
    for package in ("tora", "actors", "learner")
    for file in (ROOT / package).rglob("*.py")
    for name in re.findall(r'"([a-z]+/[a-z_0-9]+)"', file.read_text())
    if name.split("/")[0] not in ("hiyouga", "openai", "tokens", "groups", "s")
}


def test_every_metric_is_explained_and_there() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    of_mismatch = set(mismatch(*np.zeros((2, 3))))
    placeholders = {"reward/NAME", "reward/failed/NAME", "version"}
    assert explained == METRICS | of_mismatch | placeholders


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.name != "CHANGELOG.md"], ids=named)
def test_dotted_names_exist(page: Path) -> None:
    """Former names too, as long as configs may use them."""
    for span in code_spans(page):
        if re.fullmatch(r"(tora|actors|learner)(\.\w+)+", span) and "NAME" not in span and span not in CALLS:
            assert _exists(span), span


CALLS = {"learner.step"}
"""Of the loop's `learner`."""


def _exists(dotted: str) -> bool:
    if _is_module(dotted):
        return True
    if dotted.startswith("tora.tasks.rewards."):
        return callable(locate(dotted.replace("tora.tasks.rewards", "tora.rewards")))
    return callable(locate(dotted))


def _is_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def config_keys(schema: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """All keys, dotted, with those of our losses and a component's own."""
    for name, hint in get_type_hints(schema).items():
        yield prefix + name
        for kind in (hint, *getattr(hint, "__args__", ())):
            if dataclasses.is_dataclass(kind):
                yield from config_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    if schema is RunConfig:
        yield from (f"loss.{field.name}" for field in dataclasses.fields(Terms))
        yield from ("loss._component_", "optimizer.lr", "rewards.0.weight")


KEYS = set(config_keys())
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.name != "migrate.md"], ids=named)
def test_dotted_config_keys_exist(page: Path) -> None:
    """In prose, such as `rollout.update=in_flight`."""
    for span in code_spans(page):
        key = span.partition("=")[0]
        if re.fullmatch(r"[a-z_]+(\.\w+)+", key) and key.split(".")[0] in SECTIONS and key not in FOREIGN:
            assert key in KEYS, span


FOREIGN = {"rollout.n", "model.lora_rank"}
"""verl's, in the README's table."""


@pytest.mark.parametrize("page", ["README.md", "docs/migrate.md"])
def test_the_keys_that_foreign_ones_lead_to_exist(page: str) -> None:
    rows = re.findall(r"^\|.*\| ([^|]*) \|$", (ROOT / page).read_text(), re.MULTILINE)
    tables = [row for row in rows if re.fullmatch(r"(`[a-z_.]+`(, )?)+.*", row)]
    assert len(tables) >= 10
    for row in tables:
        for key in re.findall(r"`([a-z_.]+)`", row):
            assert key in KEYS or key == "weight", f"{key} in {row}"


def test_quoted_messages_are_what_the_code_says() -> None:
    """`...`, and a capital N, stand for what a message fills in."""
    files = [file for package in ("tora", "actors", "learner") for file in (ROOT / package).rglob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(file.read_text() for file in files))  # implicitly joined strings
    for message in re.findall(r'"([^"]+)"', prose(ROOT / "docs/troubleshooting.md")):
        for part in re.split(r"\.\.\.|\bN\b", message):
            assert part.strip() in source, message


# Code, configs and data.


def write_files(folder: Path, page: Path) -> None:
    """The page's named blocks, as its reader would have them."""
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)


@pytest.mark.parametrize("block", every_block("python"), ids=str)
def test_python_compiles_and_its_imports_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), alias.name


@pytest.mark.parametrize("block", every_block("yaml"), ids=str)
def test_configs_load(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole config as it is; a part of one over the quick-start's."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, block.page)
    whole = "extends:" in block.text
    (tmp_path / "block.yaml").write_text(block.text if whole else f"extends: quickstart.yaml\n{block.text}")
    cfg = load_config("block.yaml")
    for component in (cfg.dataset, *([cfg.eval.dataset] if cfg.eval else []), *cfg.metric_logger, *cfg.rewards):
        assert callable(importable(component["_component_"], tmp_path)), component


def importable(dotted: str, folder: Path) -> Any:
    """The callable; one of the page's own from its file."""
    module, _, name = dotted.rpartition(".")
    if (folder / f"{module}.py").is_file():
        scope: dict[str, Any] = {}
        exec((folder / f"{module}.py").read_text(), scope)
        return scope[name]
    return locate(dotted)


@pytest.mark.parametrize("block", every_block("json"), ids=str)
def test_data_loads(block: Block, tmp_path: Path) -> None:
    from tora.tasks.dataset import file_dataset

    file = tmp_path / block.file
    file.write_text(block.text)
    rows = file_dataset(str(file))
    assert len(rows) == len(block.text.splitlines())
    assert all(rows[i]["prompt"] and rows[i]["answer"] for i in range(len(rows)))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/your-task.md"], ids=named)
def test_the_example_reward_scores_the_example_data(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, page)
    reward = importable("my_rewards.exact", tmp_path)
    (block,) = blocks(page, "json")
    for row in map(json.loads, block.text.splitlines()):
        said = [f"{row['answer'].upper()}.", "I do not know"]
        assert reward(prompts=[row["prompt"]] * 2, completions=said, answer=[row["answer"]] * 2) == [1.0, 0.0]


def test_the_readmes_example_runs_through_the_rewarder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(tmp_path, ROOT / "README.md")
    rewarder = build_rewarder(load_config("capitals.yaml").rewards)
    scores = rewarder(Prompt(0, (1,), "Capital of Peru?", {"answer": "Lima"}), ["Lima.", "Quito"], [[1], [2]])
    assert scores == [{"exact": 1.0}, {"exact": 0.0}]


# Commands.


def commands(text: str) -> list[list[str]]:
    """The words of each command, comments and variables before it left out."""
    lines = text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [_without_variables(words) for words in split if words]


def _without_variables(words: list[str]) -> list[str]:
    return _without_variables(words[1:]) if re.fullmatch(r"[A-Z_]+=.*", words[0]) else words


def check(words: list[str]) -> None:
    """Whether a command may be typed as it stands. An unknown kind of command is an error: none goes unchecked."""
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
    elif words[0] == "validate":
        for name in args.configs:
            load_config(name)
    elif words[0] == "cp":
        config_file(args.name)
    elif words[0] == "bench" and args.config:
        assert args.config in shape_names()
    elif words[0] == "doctor" and args.parity:
        assert (ROOT / args.parity / "config.json").is_file()


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        if words[1] in ("venv", "pytest", "pip"):
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
    """Its options, by the fields of its arguments: to import vLLM takes too long for a unit test."""
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
def test_commands_may_be_typed(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, block.page)
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


def test_every_fenced_block_is_of_a_kind_that_is_checked() -> None:
    for block in every_block():
        assert block.language in ("bash", "python", "yaml", "json", ""), block
        assert block.language or not re.search(r"^(tora|tune|pip|\./deploy)", block.text, re.MULTILINE), block
