"""A mistake is answered with the same sentence whether a run is synchronous or on Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import output, tora_run

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


_LOSS = """
from dataclasses import dataclass
from learner.loss import GRPOLoss

class Odd(Exception):
    def __init__(self, first, second):  # does not unpickle
        super().__init__(f"{first} of {second}")

@dataclass(frozen=True)
class Failing(GRPOLoss):
    def __call__(self, x):
        raise Odd("none", "them")
"""


@pytest.mark.slow
@pytest.mark.parametrize("learner_ranks", [1, 2])
def test_what_a_users_loss_raises_is_one_sentence_and_its_place(tmp_path: Path, learner_ranks: int) -> None:
    """Whose class the driver cannot read. The traceback is in the rank's log."""
    folder, module = tmp_path / "run", tmp_path / "odd_losses.py"
    module.write_text(_LOSS)
    words = ["rollout.engine=torch", f"import_from=[{tmp_path}]", "loss._component_=odd_losses.Failing"]
    with tora_run(folder, *words, f"learner_ranks={learner_ranks}") as run:
        assert run.wait(200) == 1
    *_, said = output(folder).splitlines()
    assert said.startswith(f"a learner rank failed: Odd: none of them ({module}, line 12: raise Odd(")
    log = folder / "logs/learner_rank_0_log.txt"
    assert f"what it printed is in {log}" in said and "Traceback" in log.read_text()
