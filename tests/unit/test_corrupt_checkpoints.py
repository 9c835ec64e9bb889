"""Ways in which a folder of checkpoints is corrupted: a run resumes from the newest good one, or is refused in one
sentence. The checkpoints are a real learner's."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fakes import make_group, make_prompt
from learners import config, make_batch, make_groups
from safetensors import SafetensorError
from tiny import make_text_model

from learner.learner import Learner
from tora.errors import ConfigError
from tora.run.checkpoints import Checkpoints, RunState
from tora.types import RolloutState

FILES = [
    "groups.json", "groups.safetensors", "learner.json", "manifest.json", "optimizer.safetensors", "run_state.json",
    "weights.safetensors",
]  # fmt: skip


def save(folder: Path, learner: Learner, step: int) -> None:
    finished = [(step, make_group(make_prompt(step), [0.0, 1.0], length=step))]
    state = RunState(step, RolloutState(step + 1, [step], finished), run_id="the-run")
    Checkpoints(folder, keep=9).save(state, learner)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Learner, list[torch.Tensor]]]:
    """Checkpoints of steps 1 to 3, a learner to restore, and the first trained tensor at each step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cfg = config(make_text_model(folder / "model", num_layers=1))
    learner, seen = Learner(cfg), []
    for step in (1, 2, 3):
        learner.step(make_batch(make_groups(seed=step)))
        save(folder / "saved", learner, step)
        seen.append(first_tensor(learner))
    yield folder / "saved", Learner(cfg), seen


def first_tensor(learner: Learner) -> torch.Tensor:
    return next(p for p in learner.model.parameters() if p.requires_grad).detach().clone()


def overwrite(file: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)


def flip(place: float) -> Callable[[Path], None]:
    def change(content: bytearray) -> None:
        content[int(place * (len(content) - 1))] ^= 1

    return lambda file: overwrite(file, change)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


OF_FILES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "cut by a byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "its first byte flipped": flip(0),
    "a bit flipped in its middle": flip(0.5),
    "its last byte flipped": flip(1),
    "zeros after a power cut": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    "something appended": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "of an older checkpoint": lambda file: shutil.copy(file.parent.with_name("step_000001") / file.name, file),
    "a folder": make_folder,
    "a link to nowhere": dangle,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", OF_FILES)
def test_a_corrupt_file_costs_its_checkpoint(
    made: tuple[Path, Learner, list[torch.Tensor]], tmp_path: Path, name: str, how: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(made[0], folder)
    OF_FILES[how](folder / "step_000003" / name)
    check_resumes(folder, 2, made)


def check_resumes(folder: Path, step: int, made: tuple[Path, Learner, list[torch.Tensor]]) -> None:
    _, learner, seen = made
    checkpoints = Checkpoints(folder, keep=9)
    found = checkpoints.to_resume()
    assert found is not None and found == checkpoints.to_resume(may_start=True) == checkpoints.folder_of(step)
    state = checkpoints.read(found, make_prompt)
    learner.restore(found)
    assert state.step == learner.version == step and torch.equal(first_tensor(learner), seen[step - 1])


def newest(folder: Path) -> Path:
    return folder / "step_000003"


OF_FOLDERS: dict[str, tuple[int, Callable[[Path], object]]] = {
    "the newest is deleted": (2, lambda folder: shutil.rmtree(newest(folder))),
    "the newest is empty": (2, lambda folder: [file.unlink() for file in newest(folder).iterdir()]),
    "the newest is a file": (2, lambda folder: (shutil.rmtree(newest(folder)), newest(folder).touch())),
    "the newest is a link to nowhere": (
        2,
        lambda folder: (shutil.rmtree(newest(folder)), newest(folder).symlink_to("nowhere")),
    ),
    "the newest lies on another disk": (
        3,
        lambda folder: (newest(folder).rename(folder / "moved"), newest(folder).symlink_to("moved")),
    ),
    "a writer died": (3, lambda folder: shutil.copytree(newest(folder), folder / ".step_000004")),
    "a writer died before the manifest": (
        3,
        lambda folder: (
            shutil.copytree(newest(folder), folder / "step_000004"),
            (folder / "step_000004/manifest.json").unlink(),
        ),
    ),
    "an old one is renamed to a later step": (
        3,
        lambda folder: (folder / "step_000001").rename(folder / "step_000009"),
    ),
    "a copy under a name of the user's": (3, lambda folder: shutil.copytree(newest(folder), folder / "step_backup")),
    "other files beside": (3, lambda folder: [(folder / name).touch() for name in ("step_", "step_1", "notes.txt")]),
    "an old one is damaged": (3, lambda folder: (folder / "step_000001/weights.safetensors").unlink()),
    "the two newest are damaged": (
        1,
        lambda folder: [(folder / name / "learner.json").unlink() for name in ("step_000002", "step_000003")],
    ),
    "the manifest lists nothing": (2, lambda folder: empty(newest(folder), "{}")),
    "the manifest is another document": (2, lambda folder: empty(newest(folder), "[1]")),
}


def empty(checkpoint: Path, manifest: str) -> None:
    for file in checkpoint.iterdir():
        file.unlink()
    (checkpoint / "manifest.json").write_text(manifest)


@pytest.mark.parametrize("how", OF_FOLDERS)
def test_a_corrupt_folder_costs_what_is_corrupt(
    made: tuple[Path, Learner, list[torch.Tensor]], tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(made[0], folder)
    step, corrupt = OF_FOLDERS[how]
    corrupt(folder)
    check_resumes(folder, step, made)


@pytest.mark.parametrize("how", sorted(OF_FILES.keys() - {"of an older checkpoint"}))
def test_a_run_whose_every_checkpoint_is_corrupt_is_refused_in_one_sentence(
    made: tuple[Path, Learner, list[torch.Tensor]], tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(made[0], folder)
    for checkpoint in folder.iterdir():
        OF_FILES[how](checkpoint / "weights.safetensors")
    with pytest.raises(ConfigError) as error:
        Checkpoints(folder, keep=9).to_resume(may_start=True)
    said = str(error.value)
    assert "\n" not in said and "no intact checkpoint" in said and all(f"step_00000{n}" in said for n in (1, 2, 3))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.95])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    made: tuple[Path, Learner, list[torch.Tensor]], tmp_path: Path, share: float
) -> None:
    """The kernel takes no byte beyond a limit, at several moments of writing."""
    folder, learner = tmp_path / "checkpoints", made[1]
    shutil.copytree(made[0], folder)
    learner.restore(newest(folder))
    learner.version = 4
    sizes = [file.stat().st_size for file in newest(folder).iterdir()]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * max(sizes)), hard))
    try:
        with pytest.raises((OSError, SafetensorError)):
            save(folder, learner, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in folder.iterdir()) == ["step_000001", "step_000002", "step_000003"]
    check_resumes(folder, 3, made)
    save(folder, learner, 3)
    check_resumes(folder, 3, made)


def test_two_writers_leave_one_checkpoint(made: tuple[Path, Learner, list[torch.Tensor]], tmp_path: Path) -> None:
    """A run's folder is locked. Where the file system has no locks: what is there afterwards is whole or left out."""
    folder, learner = tmp_path / "checkpoints", made[1]
    shutil.copytree(made[0], folder)
    learner.restore(newest(folder))

    def write() -> None:
        for _ in range(8):
            with suppress(OSError, SafetensorError):  # the other has taken its files away
                save(folder, learner, 3)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = Checkpoints(folder, keep=9).to_resume()
    assert found is not None and json.loads((found / "run_state.json").read_text())["step"] in (2, 3)
    check_resumes(folder, int(found.name[-1]), made)
