"""A mistake is answered with the same sentence whether a run is synchronous or on Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = ROOT / "configs" / "bases" / "chain_sum"
CASES = {
    "a row": ({"prompt": None, "answer": "2"}, "rewards=[good.f]", "its prompt is null"),
    "a reward's module": ({"prompt": "1", "answer": "2"}, "rewards=[bad.f]", "_component_=bad.f cannot be imported"),
    "a reward's name": ({"prompt": "1", "answer": "2"}, "rewards=[good.g]", "_component_=good.g: g does not exist"),
    "weights": ({"prompt": "1", "answer": "2"}, "model.path=model", "is empty; download it again"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_sentence_is_the_same_on_ray(case: str, tmp_path: Path) -> None:
    row, override, words = CASES[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    (tmp_path / "good.py").write_text("def f(completions):\n    return [0.0] * len(completions)\n")
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    data = "dataset={_component_: tora.tasks.dataset.file_dataset, path: rows.jsonl}"
    said = []
    for where in ("async_rl=false", "async_rl=true"):
        words_of_run = ["run", "quickstart", where, "rollout.engine=torch", "eval=null", data, override]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "tora", *words_of_run]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert not (tmp_path / "outputs").exists() or not any((tmp_path / "outputs").iterdir())
        said.append(done.stderr.strip())
    assert said[0] == said[1] and words in said[0] and len(said[0].splitlines()) == 1
