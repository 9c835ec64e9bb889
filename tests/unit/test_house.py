"""Rules of the code base: who imports whom, how large files are, what tests may patch, what must import quickly."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from imports import at_import_time, imports, packages
from private_patches import private_patches

from tora.cli import main
from tora.config.load import config_names, configs_dir

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tora", "actors", "learner")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

LAYERS = (
    ("tora", "tora.errors", "tora.types", "tora.protocols", "tora.compat"),
    ("tora.config",),
    ("tora.distributed",),
    ("tora.models",),
    ("tora.adapters",),
    ("tora.plan",),
    ("tora.batching",),
    ("tora.reporting",),
    ("tora.rewards",),
    ("tora.environments",),
    ("tora.tasks",),
    ("actors", "learner"),
    ("tora.run",),
    ("tora.launch",),
    ("tora.bench",),
    ("tora.commands",),
    ("tora.trainer",),
    ("tora.cli",),
    ("tora.__main__",),
)
"""Low to high. A package imports only from lower layers. Only in the lowest layer may modules import each other."""
LAYER_OF = {package: layer for layer, members in enumerate(LAYERS) for package in members}

FORBIDDEN = {
    "actors/": {"learner", "torchtune"},
    "learner/": {"actors", "vllm"},
    "tora/run/": {"actors", "learner"},
}
KNOWS_BOTH_SIDES = "tora/launch/"
LIGHT = ("tora.config.schema", "tora.types", "tora.errors", "tora.protocols", "tora.config.load", "tora.cli")
MAX_LINES = 400


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def package_of(module: str) -> str:
    """`tora.models` for `tora.models.vision.tower`, `actors` for `actors.pool`."""
    parts = module.split(".")
    package = ".".join(parts[:2]) if parts[0] == "tora" else parts[0]
    return package if package in LAYER_OF else parts[0]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_imports_upward(file: Path) -> None:
    module = name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package = package_of(module)
    assert package != "tora" or module == "tora", f"{module} is in no layer: add its package to LAYERS"
    layer = LAYER_OF[package]
    for module, line in imports(ast.walk(ast.parse(file.read_text()))):
        other = package_of(module)
        if other in LAYER_OF and other != package:
            allowed = LAYER_OF[other] < layer or LAYER_OF[other] == layer == 0
            assert allowed, f"{name_of(file)}:{line} imports {module}, but {other} is not below {package}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_actors_and_learner_stay_apart(file: Path) -> None:
    name, tree = name_of(file), ast.parse(file.read_text())
    found = packages(imports(ast.walk(tree)))
    for folder, forbidden in FORBIDDEN.items():
        if name.startswith(folder):
            assert not found & forbidden, f"{name} imports {', '.join(found & forbidden)}"
    if not name.startswith(KNOWS_BOTH_SIDES):
        assert not found >= {"actors", "learner"}, (
            f"{name} imports both actors and learner: only {KNOWS_BOTH_SIDES} may"
        )
    if name.startswith("tora/"):
        early = packages(imports(at_import_time(tree))) & {"ray", "vllm"}
        assert not early, f"{name} imports {', '.join(early)} at module level"


def test_few_files_at_the_top_of_tora() -> None:
    assert len(list((ROOT / "tora").glob("*.py"))) <= 8


def test_the_wheel_holds_our_packages_only() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == list(PACKAGES)
    assert wheel["force-include"] == {"configs": "tora/configs"}
    assert {file.parent.name for file in ROOT.glob("*/__init__.py")} == set(PACKAGES)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_classes_are_plain(file: Path) -> None:
    """`tora/launch/` turns classes into Ray actors; a decorated class could not be tested in process."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            assert not [d for d in node.decorator_list if "remote" in ast.unparse(d)], node.name


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=name_of)
def test_size(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


def test_names_of_test_files_are_unique() -> None:
    """pytest imports them as top-level modules, so two of one name stop the collection of all tests."""
    names = [file.name for file in TESTS if file.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize("file", TESTS, ids=name_of)
def test_no_test_patches_a_private_name(file: Path) -> None:
    found = private_patches(ast.parse(file.read_text()), PACKAGES)
    assert not found, f"{name_of(file)} patches private names, {'; '.join(found)}: use an argument or a public name"


@pytest.mark.parametrize(
    "code",
    [
        'monkeypatch.setattr(seat, "_PULSE_S", 1)',
        'monkeypatch.setattr(target=seat, name="_PULSE_S", value=1)',
        'monkeypatch.setattr("actors.seat._PULSE_S", 1)',
        'monkeypatch.delattr(seat, "_PULSE_S")',
        'monkeypatch.setitem(seat._TABLE, "key", 1)',
        'mock.patch("actors.seat._pulse")',
        'mock.patch.object(seat, "_pulse")',
        'patch.dict("actors.seat._TABLE", key=1)',
        'setattr(seat, "_PULSE_S", 1)',
        "seat._PULSE_S = 1",
        "seat._PULSE_S += 1",
        "seat.public, (worker._clock, x) = 1, (2, 3)",
        "del seat._PULSE_S",
    ],
)
def test_private_patches_are_found(code: str) -> None:
    tree = ast.parse(f"from unittest import mock\nfrom actors import seat\n{code}")
    assert len(private_patches(tree, PACKAGES)) == 1


@pytest.mark.parametrize(
    "code",
    [
        'monkeypatch.setattr(seat, "pause", 1)',
        'monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)',
        'monkeypatch.setattr(ray, "_private", 1)',
        "ray._private.constant = 1",
        "ray._state = 1",
        "self._steps = 1",
        'monkeypatch.setattr(Adapter, "__call__", 1)',
        'monkeypatch.setitem(sys.modules, "tora._x", 1)',
        "steps = seat._PULSE_S",
    ],
)
def test_other_patches_are_allowed(code: str) -> None:
    assert not private_patches(ast.parse(f"import ray\nfrom actors import seat\n{code}"), PACKAGES)


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
