"""The script that makes SmolLM2's folder, as far as it goes without the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples/smollm2/make_model.py"


HIDE_GGUF = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, package=None: None if name == "gguf" else find(name, package)
"""


def make(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = (
        f"{before}\nimport runpy, sys\nsys.argv[0] = {str(SCRIPT)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    done = make("--out", str(tmp_path / "model"), before=HIDE_GGUF)
    assert done.returncode == 1
    assert done.stderr.strip() == "gguf not installed: pip install -e '.[real]'"


@pytest.mark.parametrize(("there", "message"), [(True, "has SHA-256"), (False, "No such file")])
def test_a_file_that_is_not_the_model(tmp_path: Path, there: bool, message: str) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "other.gguf"
    if there:
        file.write_text("GGUF")
    done = make("--gguf", str(file), "--out", str(tmp_path / "models/model"))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = make("--out", str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, f"{tmp_path} already exists")
