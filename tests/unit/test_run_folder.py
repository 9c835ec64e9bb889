"""A run's folder: one run at a time, and nothing but an earlier run is moved aside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tora.errors import ConfigError
from tora.run.folder import LOCK, held

HOLDER = "import sys; from pathlib import Path; from tora.run.folder import held\n"
HOLDER += "with held(Path(sys.argv[1]), resumes=False): print('held', flush=True); sys.stdin.read()"


def write_run(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in {"config.yaml": "name: a", "metrics.jsonl": "{}", **files}.items():
        (folder / name).write_text(text)


def test_an_earlier_run_is_moved_aside_and_the_next_one_too(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for number in range(3):
        with held(path, resumes=False) as folder:
            folder.start_over()
            (path / "config.yaml").write_text(f"name: {number}")
            (path / "metrics.jsonl").touch()
    names = {p.name: (p / "config.yaml").read_text() for p in tmp_path.iterdir()}
    assert names == {"run.1": "name: 0", "run.2": "name: 1", "run": "name: 2"}


@pytest.mark.parametrize("files", [{"thesis.tex": ""}, {"config.yaml": "a stranger's"}, {"metrics.jsonl": ""}])
def test_a_folder_of_something_else_is_refused_and_left_as_it_was(tmp_path: Path, files: dict[str, str]) -> None:
    path = tmp_path / "home"
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    words = f"holds files that no run of Tora wrote, such as {next(iter(files))!r}"
    with pytest.raises(ConfigError, match=words), held(path, resumes=False):
        pass
    assert {p.name: p.read_text() for p in path.iterdir()} == files
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_a_folder_in_use_is_refused_to_fresh_and_resumed_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    try:
        for resumes in (False, True):
            with pytest.raises(ConfigError, match="is in use by another run"), held(tmp_path / "run", resumes=resumes):
                pass
    finally:
        other.kill()
        other.wait()
    with held(tmp_path / "run", resumes=True):
        pass  # a killed run holds nothing


def test_the_new_folder_is_held_after_the_old_one_moved(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with held(tmp_path / "run", resumes=False) as folder:
        folder.start_over()
        with pytest.raises(ConfigError, match="in use"), held(tmp_path / "run", resumes=True):
            pass
        with held(tmp_path / "run.1", resumes=True):
            pass


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "run", resumes=True):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "run").exists()
    write_run(tmp_path / "old")
    with held(tmp_path / "old", resumes=False):
        pass
    assert sorted(p.name for p in (tmp_path / "old").iterdir()) == [LOCK, "config.yaml", "metrics.jsonl"]


def test_what_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        for resumes in (False, True):
            with pytest.raises(ConfigError), held(path, resumes=resumes):
                pass
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a run"])
def test_a_run_that_is_undone_leaves_what_was_there_before(tmp_path: Path, before: str) -> None:
    path = tmp_path / "run"
    if before == "a run":
        write_run(path, keep="me")
    elif before == "an empty folder":
        path.mkdir()
    at_first = {p.relative_to(tmp_path): p.is_file() and p.read_text() for p in tmp_path.rglob("*") if p.name != LOCK}
    with pytest.raises(ConfigError), held(path, resumes=False) as folder:
        folder.start_over()
        (path / "completions").mkdir()
        for name in ("config.yaml", "metrics.jsonl", "completions/step_1.parquet"):
            (path / name).write_text("new")
        folder.undo()
        raise ConfigError("a mistake")
    folder.leave()  # a stop handler may call it again
    now = {p.relative_to(tmp_path): p.is_file() and p.read_text() for p in tmp_path.rglob("*") if p.name != LOCK}
    assert now == at_first


def test_a_resumed_run_is_never_undone(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with held(tmp_path / "run", resumes=True) as folder:
        folder.undo()
    assert (tmp_path / "run" / "config.yaml").read_text() == "name: a"
