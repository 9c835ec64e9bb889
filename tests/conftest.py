"""The environment of every test, set before anything else is imported."""

import os
from pathlib import Path

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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`, engines and clusters have one process to themselves, one at a time; the files of
    the other tests share the other."""
    for item in items:
        group = "engines" if "integration" in item.path.parts else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library caches what it converts in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
