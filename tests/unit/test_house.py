"""The rules of the house: who imports whom, what stays light, and that everything shipped holds together."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tora.cli import main
from tora.config.load import config_names, configs_dir

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tora", "actors", "learner")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
FORBIDDEN = {
    "actors": {"learner", "torchtune"},
    "learner": {"actors", "vllm"},
    "tora": set(),
}
KNOWS_BOTH_SIDES = "tora/launch/"
LIGHT = (
    "tora.config.schema",
    "tora.types",
    "tora.errors",
    "tora.protocols",
    "tora.config.load",
    "tora.cli",
    "actors.vllm_engine.config",
)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """Top-level packages that the given statements import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those in functions, nor for the type checker only."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not checking and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports(file: Path) -> None:
    tree = ast.parse(file.read_text())
    package = name_of(file).split("/")[0]
    names = imported(ast.walk(tree))
    assert not names & FORBIDDEN[package]
    assert name_of(file).startswith(KNOWS_BOTH_SIDES) or not names >= {"actors", "learner"}
    if package == "tora":
        assert not imported(list(at_import_time(tree))) & {"ray", "vllm"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_classes_are_plain(file: Path) -> None:
    """`tora/launch/` makes them remote; a decorated class could not be tested in process."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            assert not [d for d in node.decorator_list if "remote" in ast.unparse(d)], node.name


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_size(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules(module: str) -> None:
    heavy = "{'torch', 'transformers', 'ray', 'vllm', 'torchtune', 'numpy'}"
    script = f"import sys, {module}; found = {heavy} & set(sys.modules); sys.exit(', '.join(found) or None)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_config_validates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *config_names()]) == 0
    assert capsys.readouterr().out.count(": OK") == len(config_names())


def test_configs_are_short_and_every_base_is_used() -> None:
    texts = {file.relative_to(configs_dir()).as_posix(): file.read_text() for file in configs_dir().rglob("*.yaml")}
    for name, text in texts.items():
        if name.startswith("base/"):
            assert any(name in other for other in texts.values()), name
        else:
            assert len(text.splitlines()) <= 60, name
