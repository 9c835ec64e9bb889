"""The environment of every test, set before anything else is imported."""

import os
from pathlib import Path
from typing import Any

import pytest

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_worker_niceness": "0",  # Ray's 15 starves its workers beside a busy second process of tests
    "OMP_NUM_THREADS": "1",  # threads that wait for each other cost tiny models more than they give
}.items():
    os.environ.setdefault(name, value)

import tora  # noqa: E402, F401  (its import fixes must precede transformers and peft)

_WITHOUT_ENGINES = {
    f"tests/integration/test_{name}.py"
    for name in (
        *("abandoned_children", "async_rewards", "bad_environments", "bad_values_end_to_end", "compile", "distributed"),
        *("distributed_reference", "environments", "memory_plan", "optimizer_ranks", "reward_processes"),
        *("vision_scale", "vision_torch_runs"),
    )
}
"""Integration tests that start neither vLLM nor Ray."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`, vLLM and Ray run one at a time, in one process; the files of other tests fill the other."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "engines" if file.startswith("tests/integration/") and file not in _WITHOUT_ENGINES else file

    return Scheduling(config, log)


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library caches what it converts in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
