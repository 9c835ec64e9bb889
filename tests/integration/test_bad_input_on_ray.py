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
    "a loss that raises": (
        {"prompt": "1", "answer": "2"},
        "loss=bad_loss.Loss",
        "loss: bad_loss.Loss raised KeyError: 'kl' (",
    ),
}
LOSS = """
from learner.loss.objective import Terms

class Loss(Terms):
    def __call__(self, x):
        raise KeyError("kl")
"""
"""A mistake that only a step shows, in a learner that may be a Ray actor."""


REWARD = ["rewards=[good.f]", "batch_size=2", "grpo_samples=4", "max_generated_tokens=8"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_sentence_is_the_same_on_ray(case: str, tmp_path: Path) -> None:
    row, override, words = CASES[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    (tmp_path / "good.py").write_text("def f(completions):\n    return [float(i) for i, _ in enumerate(completions)]\n")
    (tmp_path / "bad_loss.py").write_text(LOSS)
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    data = "dataset={_component_: tora.tasks.dataset.file_dataset, path: rows.jsonl}"
    said = []
    for where in ("async_rl=false", "async_rl=true"):
        words_of_run = ["run", "quickstart", where, "rollout.engine=torch", "eval=null", data, *REWARD, override]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "tora", *words_of_run]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (1 if case == "a loss that raises" else 2), done.stderr
        assert not (tmp_path / "outputs").exists() or not any((tmp_path / "outputs").iterdir())
        said.append(done.stderr.strip())
    assert said[0] == said[1] and words in said[0] and len(said[0].splitlines()) == 1


@pytest.mark.slow
def test_a_run_with_vllm_in_this_process_says_nothing_of_libraries(tmp_path: Path) -> None:
    words = ["run", "quickstart", "async_rl=false", "eval=null", "num_steps=1", "batch_size=2", "grpo_samples=4"]
    command = [sys.executable, "-m", "tora", *words, f"output_dir={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_cpp = "NUMA binding"  # printed by C++, of vLLM's CPU build alone
    assert not [
        line for line in done.stderr.splitlines() if line and of_cpp not in line and "trained nothing" not in line
    ]
    assert "Triton" not in done.stdout
