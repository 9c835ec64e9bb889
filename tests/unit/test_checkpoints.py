"""Checkpoints that were damaged, that the disk does not take, and of runs that fail."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runs import FakeLearner, FakeRollouts, Warnings, make_run, names
from fakes import make_group, make_prompt
from safetensors import SafetensorError

from tora.config.schema import CheckpointConfig
from tora.errors import ConfigError, LearnerLost, RolloutError, SyncError, ToraError, TrainingError
from tora.run.checkpoints import Checkpoints, RunState
from tora.run.disk import DiskError, disk_errors
from tora.run.loop import train
from tora.run.manifest import MANIFEST, damage, seal
from tora.run.recovery import train_and_export
from tora.run.run import Run
from tora.types import Metrics, RolloutState, SnapshotRef, StepResult, TrainBatch


def write(folder: Path, steps: list[int], keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        finished = [(step, make_group(make_prompt(step), [0.0, 1.0]))]
        checkpoints.save(RunState(step, RolloutState(step + 1, [step], finished)), FakeLearner(step))
    return checkpoints


def flip(file: Path, position: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def truncate(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


FILES = ["groups.json", "groups.safetensors", "run_state.json", "version", MANIFEST]
WAYS: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "emptied": lambda file: truncate(file, 0),
    "cut in half": lambda file: truncate(file, 0.5),
    "a byte changed": flip,
    "its last byte changed": lambda file: flip(file, 1),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumes_from_the_newest_intact_checkpoint(
    tmp_path: Path, name: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = write(tmp_path, [1, 2, 3])
    WAYS[way](tmp_path / "step_000003" / name)
    for _ in range(2):
        assert checkpoints.newest() == checkpoints.to_resume() == tmp_path / "step_000002"
    (warning,) = [record.message for record in caplog.records]
    assert "step_000003 is damaged and left out" in warning
    state = checkpoints.read(tmp_path / "step_000002", make_prompt)
    assert (state.step, state.rollouts.cursor, len(state.rollouts.finished)) == (2, 3, 1)


def test_without_an_intact_checkpoint_one_sentence_names_what_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no checkpoint$"):
        Checkpoints(tmp_path / "none", 2).to_resume()
    checkpoints = write(tmp_path, [1, 2])
    (tmp_path / "step_000001" / "version").unlink()
    flip(tmp_path / "step_000002" / "run_state.json")
    words = "step_000001 is damaged: version is missing; step_000002 is damaged: run_state.json has changed"
    with pytest.raises(ConfigError, match=f"holds no intact checkpoint; {words}"):
        checkpoints.to_resume()


def test_a_folder_that_was_never_finished_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, [1])
    shutil.copytree(tmp_path / "step_000001", tmp_path / ".step_000002")
    assert checkpoints.newest() == tmp_path / "step_000001"
    write(tmp_path, [2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_damaged_checkpoints_do_not_push_out_the_last_intact_one(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    flip(tmp_path / "step_000002" / "version")
    write(tmp_path, [3], keep=2)
    assert Checkpoints(tmp_path, 2).newest() == tmp_path / "step_000003"


def test_a_seal_covers_folders_within_and_ignores_what_is_added(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"")
    seal(tmp_path)
    assert damage(tmp_path) is None and list(json.loads((tmp_path / MANIFEST).read_text())) == ["inner/a"]
    (tmp_path / "added").touch()
    assert damage(tmp_path) is None
    (tmp_path / "inner" / "a").write_bytes(b"x")
    assert damage(tmp_path) == "inner/a has changed since it was written"
    (tmp_path / MANIFEST).write_text("[]")
    assert damage(tmp_path) == f"{MANIFEST} has changed since it was written"


def test_the_disk_has_the_files_before_their_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves a checkpoint with its name and without its content."""
    told: list[Path] = []

    def fsync(descriptor: int) -> None:
        told.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr("os.fsync", fsync)
    write(tmp_path, [1])
    temporary, final = tmp_path / ".step_000001", tmp_path / "step_000001"
    assert {path for path in told[:-2] if path.parent == temporary} == {temporary / f.name for f in final.iterdir()}
    assert told[-2:] == [temporary, tmp_path], "then the folder, and then the rename"


class FullDisk(FakeLearner):
    """Cannot write its files at some versions."""

    def __init__(self, error: Exception, *versions: int, later: bool) -> None:
        """`later`: it shows while the run trains on."""
        super().__init__()
        self._error, self._versions, self._later, self._begun = error, versions, later, 0

    def begin_save(self, folder: Path) -> None:
        super().begin_save(folder)
        if self.version in self._versions and not self._later:
            raise self._error
        self._begun = self.version

    def end_save(self) -> None:
        if self._begun in self._versions:
            raise self._error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
@pytest.mark.parametrize("later", [False, True])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, error: Exception, later: bool) -> None:
    run = make_run(tmp_path, [FullDisk(error, 2, 3, later=later)])
    run.cfg, run.log = dataclasses.replace(run.cfg, checkpoint=CheckpointConfig(every=1)), Warnings()
    train_and_export(run)
    assert [s.split(":")[0] for s in run.log.sentences] == ["no checkpoint of step 2", "no checkpoint of step 3"]
    assert all("No space left" in s for s in run.log.sentences)
    assert names(tmp_path) == ["step_000004", "step_000005"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (RolloutError("every worker is lost"), False),
        (KeyError("x"), False),
    ],
)
def test_a_full_disk_ends_a_run_with_what_is_whole(tmp_path: Path, error: Exception, says: bool) -> None:
    run = make_run(tmp_path, [FakeLearner()])
    train_and_export(run)
    with pytest.raises(DiskError if says else type(error)) as caught, disk_errors("out", run.checkpoints):
        raise error
    if says:
        words = "step_000005 is whole, and resume_from_checkpoint=true continues from it once there is room."
        assert str(caught.value).startswith("output_dir=out takes no more files: ") and str(caught.value).endswith(
            words
        )
        with pytest.raises(DiskError, match="there is no checkpoint"), disk_errors("x", Checkpoints(tmp_path / "x", 2)):
            raise error


class FailingRollouts(FakeRollouts):
    """Fails in a step, or when it is to publish a version."""

    def __init__(self, error: BaseException, *, step: int = -1, version: int = -1) -> None:
        super().__init__()
        self._error, self._step, self._version = error, step, version

    def next_batch(self, step: int, stop_requested: Callable[[], bool]) -> TrainBatch | None:
        if step == self._step:
            raise self._error
        return super().next_batch(step, stop_requested)

    def publish(self, snapshot: SnapshotRef) -> Metrics:
        if snapshot.version == self._version:
            raise self._error
        return super().publish(snapshot)


def failing_run(folder: Path, rollouts: FailingRollouts, **changes: bool) -> Run:
    run = make_run(folder, [FakeLearner()], **changes)
    run.rollouts = rollouts
    return run


@pytest.mark.parametrize(
    "error",
    [
        RolloutError("every worker is lost"),
        ConfigError("row 7 has no prompt"),
        ToraError("KeyError: 'x', of a worker"),
        KeyError("x"),
        MemoryError(),
        OSError(errno.ENOENT, "No such file"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", [{"step": 3}, {"version": 3}])
def test_a_run_that_its_rollouts_end_is_saved(tmp_path: Path, error: BaseException, place: dict[str, int]) -> None:
    run = failing_run(tmp_path, FailingRollouts(error, **place))
    with pytest.raises(type(error)):
        train_and_export(run)
    assert names(tmp_path) == ["step_000002", "step_000003"], "every second step, and the one it had reached"
    assert (run.checkpoints.folder_of(3) / "version").read_text() == "3"
    assert run.checkpoints.read(run.checkpoints.folder_of(3), make_prompt).step == 3


class FailsInAStep(FakeLearner):
    """With weights that may be changed in part."""

    def step(self, batch: TrainBatch) -> StepResult:
        if self.version == 3:
            raise MemoryError
        return super().step(batch)


def test_nothing_is_saved_that_is_there_or_wrong_or_shared(tmp_path: Path) -> None:
    lost, wrong = RolloutError("every worker is lost"), SyncError("other policy")
    full = OSError(errno.ENOSPC, "No space left on device")
    cases = [
        (failing_run(tmp_path / "there", FailingRollouts(lost, step=2)), RolloutError, ["step_000002"]),
        (failing_run(tmp_path / "fresh", FailingRollouts(lost, step=0)), RolloutError, []),
        (failing_run(tmp_path / "wrong", FailingRollouts(wrong, version=3)), SyncError, ["step_000002"]),
        (failing_run(tmp_path / "nan", FailingRollouts(TrainingError("nan"), step=3)), TrainingError, ["step_000002"]),
        (failing_run(tmp_path / "full", FailingRollouts(full, step=3)), OSError, ["step_000002"]),
        (make_run(tmp_path / "half", [FailsInAStep()]), MemoryError, ["step_000002"]),
        (failing_run(tmp_path / "ranks", FailingRollouts(lost, step=3), is_alone=False), RolloutError, ["step_000002"]),
    ]
    for run, error, expected in cases:
        with pytest.raises(error):
            train_and_export(run)
        assert sorted(p.name for p in run.folder.glob("checkpoints/*")) == expected


class SlowToWrite(FakeLearner):
    """A file takes half a second."""

    def __init__(self, *, lost_at: int | None = None) -> None:
        super().__init__()
        self.writing, self.steps_meanwhile, self._lost_at = False, 0, lost_at

    def step(self, batch: TrainBatch) -> StepResult:
        self.steps_meanwhile += self.writing
        return super().step(batch)

    def begin_save(self, folder: Path) -> None:
        assert not self.writing, "the next save waits for the one before"
        self.writing = True
        super().begin_save(folder)

    def end_save(self) -> None:
        time.sleep(0.5)
        self.writing = False
        if self.saved[-1] == self._lost_at:
            raise LearnerLost("one of its ranks died")


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    learner = SlowToWrite()
    run = make_run(tmp_path, [learner])
    began = time.perf_counter()
    train_and_export(run)
    assert learner.steps_meanwhile == 3, "3 and 4 beside the checkpoint of step 2, and 5 beside that of 4"
    assert time.perf_counter() - began >= 1.5 and not learner.writing, "the run's end waits for the last"
    assert names(tmp_path) == ["step_000004", "step_000005"]
    state = run.checkpoints.read(run.checkpoints.folder_of(4), make_prompt)
    assert (state.step, state.rollouts.cursor) == (4, 4), "as it was when the save began"


def test_a_learner_that_is_lost_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    learners: list[FakeLearner] = [SlowToWrite(lost_at=4), FakeLearner()]
    run = make_run(tmp_path, learners)
    train_and_export(run)
    assert names(tmp_path) == ["step_000004", "step_000005"] and run.state.step == 5
    assert isinstance(run.rollouts, FakeRollouts) and "rewind 2" in run.rollouts.events


class FailsToSave(FakeLearner):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def begin_save(self, folder: Path) -> None:
        raise self._error


@pytest.mark.parametrize("second", [LearnerLost("one of its ranks died"), ValueError("no such state")])
def test_a_failure_is_named_although_the_learner_fails_too(
    tmp_path: Path, second: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, [FailsToSave(second)])
    run.rollouts = FailingRollouts(RolloutError("every worker is lost"), step=1)
    with pytest.raises(RolloutError, match="every worker is lost"):
        train_and_export(run)
    assert caplog.messages == [f"no checkpoint of step 1: {second}"]


class Restarting(FakeRollouts):
    """No worker is up to receive the snapshot."""

    def publish(self, snapshot: SnapshotRef) -> Metrics:
        super().publish(snapshot)
        return {} if snapshot.version in (0, 3) else {"sync/bytes": 8.0}


def test_a_run_goes_on_while_every_worker_restarts(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FakeLearner()])
    run.rollouts = Restarting()
    assert train(run).bytes_per_sync == 8 and run.state.step == 5
