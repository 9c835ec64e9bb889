"""What the documentation refers to exists: links, paths, names, config keys, metrics, messages, configs, data, code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from pages import (
    DOCS,
    FOLDERS,
    PAGES,
    ROOT,
    WRITTEN,
    Block,
    blocks,
    code_spans,
    every_block,
    named,
    prose,
    slug,
    write_files,
)

import learner.loss
from learner.loss.correction import Correction
from learner.mismatch import mismatch
from tora.config.components import locate
from tora.config.load import load_config
from tora.config.schema import Advantage, RunConfig
from tora.rewards.rewarder import build_rewarder
from tora.types import Prompt


def test_the_index_lists_every_page_in_one_line() -> None:
    lines = (ROOT / "docs/README.md").read_text().splitlines()
    for page in DOCS:
        if page.name != "README.md":
            assert len([line for line in lines if f"]({page.name})" in line]) == 1, page.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page: Path) -> None:
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


def test_the_explained_metrics_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    of_mismatch = set(mismatch(*np.zeros((2, 3))))
    placeholders = {"reward/NAME", "reward/failed/NAME", "logged/NAME", "version", "eval/pass@K", "eval/NAME/reward"}
    assert explained == METRICS | of_mismatch | placeholders


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.name != "CHANGELOG.md"], ids=named)
def test_dotted_names_exist(page: Path) -> None:
    """Current names, and former ones that configs may still use."""
    for span in code_spans(page):
        if re.fullmatch(r"(tora|actors|learner)(\.\w+)+", span) and "NAME" not in span and span not in CALLS:
            assert _exists(span), span


CALLS = {"learner.step"}
"""Methods of the loop's `learner`, not names in the package `learner`."""


def _exists(dotted: str) -> bool:
    if _is_module(dotted):
        return True
    if dotted.startswith("tora.tasks.rewards."):
        return callable(locate(dotted.replace("tora.tasks.rewards", "tora.rewards")))
    return callable(locate(dotted))


def _is_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ModuleNotFoundError:  # its parent is not a package
        return False


LOSSES = {n: v for n, v in vars(learner.loss).items() if n.endswith("Loss") and dataclasses.is_dataclass(v)}


def config_keys(schema: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys, including those of our losses and components."""
    for name, hint in get_type_hints(schema).items():
        yield prefix + name
        for kind in (hint, *getattr(hint, "__args__", ())):
            if dataclasses.is_dataclass(kind):
                yield from config_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    if schema is RunConfig:
        yield from (f"loss.{field.name}" for loss in LOSSES.values() for field in dataclasses.fields(loss))
        yield from ("loss._component_", "optimizer.lr", "rewards.0.weight")


KEYS = set(config_keys())
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.name != "migrate.md"], ids=named)
def test_dotted_config_keys_exist(page: Path) -> None:
    """Keys in prose, such as `rollout.update=in_flight`."""
    for span in code_spans(page):
        key = span.partition("=")[0]
        if re.fullmatch(r"[a-z_]+(\.\w+)+", key) and key.split(".")[0] in SECTIONS and key not in FOREIGN:
            assert key in KEYS, span


FOREIGN = {"rollout.n", "model.lora_rank"}
"""verl's keys in the README's table."""


@pytest.mark.parametrize("page", ["README.md", "docs/migrate.md"])
def test_our_keys_in_tables_of_other_libraries_keys_exist(page: str) -> None:
    rows = re.findall(r"^\|.*\| ([^|]*) \|$", (ROOT / page).read_text(), re.MULTILINE)
    tables = [row for row in rows if re.fullmatch(r"(`[a-z_.]+`(, )?)+.*", row)]
    assert len(tables) >= 10
    for row in tables:
        for key in re.findall(r"`([a-z_.]+)`", row):
            assert key in KEYS or key == "weight", f"{key} in {row}"


def test_the_page_on_losses_names_every_loss_and_only_what_exists() -> None:
    """Its tables: losses and advantages, keys, and ours beside TRL's and verl's."""
    listed, advantages, keys, theirs = (
        re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:]
        for table in re.findall(r"(?:^\|.*\n)+", prose(ROOT / "docs/losses.md"), re.MULTILINE)
    )
    assert {cell.strip("`").removeprefix("learner.loss.") for cell in listed} == set(LOSSES)
    assert {cell.strip("`") for cell in advantages} == set(get_args(Advantage))
    arguments = {key.removeprefix("loss.") for key in KEYS if key.startswith("loss.")}
    for cell in (*keys, *theirs):
        for span in re.findall(r"`([^`]+)`", cell):
            key, _, value = span.partition(": ")
            assert key in KEYS | arguments | set(LOSSES) | {"kl"}, span
            if key == "importance_correction":
                assert value in get_args(Correction), span
    named = {span for cell in theirs for span in re.findall(r"`(\w+Loss)`", cell)}
    assert named == set(LOSSES), "each has a row beside TRL's and verl's"


def test_quoted_messages_are_what_the_code_says() -> None:
    """`...` and a capital N stand for the parts that a message fills in."""
    files = [file for package in ("tora", "actors", "learner") for file in (ROOT / package).rglob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(file.read_text() for file in files))  # implicitly joined strings
    for message in re.findall(r'"([^"]+)"', prose(ROOT / "docs/troubleshooting.md")):
        for part in re.split(r"\.\.\.|\bN\b", message):
            assert part.strip() in source, message


# Code, configs and data.


@pytest.mark.parametrize("block", every_block("python"), ids=str)
def test_python_compiles_and_its_imports_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), alias.name


@pytest.mark.parametrize("block", every_block("yaml"), ids=str)
def test_configs_load(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete config loads as it is, a partial one on top of the quick-start's."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, block.page)
    whole = "extends:" in block.text
    (tmp_path / "block.yaml").write_text(block.text if whole else f"extends: quickstart.yaml\n{block.text}")
    cfg = load_config("block.yaml")
    for component in (cfg.dataset, *([cfg.eval.dataset] if cfg.eval else []), *cfg.metric_logger, *cfg.rewards):
        assert callable(importable(component["_component_"], tmp_path)), component


def importable(dotted: str, folder: Path) -> Any:
    """The callable: from the page's own file if it has one, else imported."""
    module, _, name = dotted.rpartition(".")
    if (folder / f"{module}.py").is_file():
        scope: dict[str, Any] = {}
        exec((folder / f"{module}.py").read_text(), scope)
        return scope[name]
    return locate(dotted)


def test_the_tutorials_files_are_the_examples() -> None:
    shown = {block.file: block.text for block in blocks(ROOT / "docs/tutorial.md") if block.file}
    assert len(shown) == 2
    for name, text in shown.items():
        assert (ROOT / "examples/plurals" / name).read_text() == text, name


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


def test_every_fenced_block_is_of_a_kind_that_is_checked() -> None:
    for block in every_block():
        assert block.language in ("bash", "python", "yaml", "json", ""), block
        assert block.language or not re.search(r"^(tora|tune|pip|\./deploy)", block.text, re.MULTILINE), block
