"""The run's output folder: held by one run at a time, and only ever taken over from an earlier run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tora.errors import ConfigError
from tora.run.identity import CONFIG, run_id_in

LOCK = ".tora.lock"
"""Exists in every run's folder; locked for as long as the run lives, on the machine of its driver."""


class RunFolder:
    """An output folder that this process holds. Build it with `held`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_new = not path.exists()
        self._lock: FileLock | None = None
        self._is_fresh = False  # whether all that the folder holds is of this run
        self._renamed: Path | None = None
        self._is_undone = False

    def lock(self) -> None:
        """Raises ConfigError if another run holds the folder, or if no folder can be made there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"output_dir={str(self.path)!r} is in use by another run. Wait for it or choose another folder."
            ) from None
        except OSError as error:
            raise ConfigError(f"output_dir={str(self.path)!r} cannot be written to: {error}.") from error
        self._lock = lock

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def leave(self) -> None:
        """Release the folder, and remove it if it was new and nothing was written into it. See `undo`."""
        self.release()
        if self._is_undone:
            self._is_undone = False
            self._empty()
            if self._renamed is not None and not self.path.exists():
                self._renamed.rename(self.path)
        elif self._is_new and self.path.exists() and [p.name for p in self.path.iterdir()] == [LOCK]:
            (self.path / LOCK).unlink()
            self.path.rmdir()

    def _empty(self) -> None:
        """Remove what is in the folder, and the folder itself unless it was there before without a run."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        if self._is_new or self._renamed is not None:
            self.path.rmdir()

    def undo(self) -> None:
        """Let `leave` remove what this run wrote and put the earlier run back, if the run began with `start_over`."""
        self._is_undone = self._is_fresh

    def check_may_start(self) -> None:
        """Raises ConfigError if a fresh run cannot start here: the folder holds something that is not a run."""
        if not self._contents() or self._is_run():
            return
        odd = sorted(path.name for path in self._contents())[0]
        raise ConfigError(
            f"output_dir={str(self.path)!r} holds files that no run of Tora wrote, such as {odd!r}. Choose an empty or "
            "a new folder."
        )

    def start_over(self) -> None:
        """Rename the folder to the first free `FOLDER.1`, `FOLDER.2`, ... if it holds a run, and hold a new one."""
        self._is_fresh = True
        if not self._contents():
            return
        self.check_may_start()
        number = 1
        while (renamed := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(renamed)
        self._renamed = renamed
        self.release()
        self.lock()

    def _contents(self) -> list[Path]:
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise ConfigError(f"output_dir={str(self.path)!r} is a file. Choose a folder.")
        return [path for path in self.path.iterdir() if path.name not in (LOCK, f".{CONFIG}")]

    def _is_run(self) -> bool:
        if all((self.path / name).is_file() for name in (CONFIG, "metrics.jsonl")):
            return True
        with suppress(ConfigError):  # a stranger's config.yaml may be anything
            return run_id_in(self.path) is not None  # a run that died while it started
        return False


@contextmanager
def held(path: Path, *, resumes: bool) -> Iterator[RunFolder]:
    """Holds the folder until the end, and removes it if it was made here and nothing was written into it.

    Raises ConfigError as `RunFolder.lock` does and, unless the run resumes, as `check_may_start` does.
    """
    try:
        path.exists()
    except OSError as error:  # a name that is too long, for instance
        raise ConfigError(f"output_dir={str(path)[:100]!r} cannot be written to: {error.strerror}.") from error
    folder = RunFolder(path)
    if not resumes:
        folder.check_may_start()
    folder.lock()
    try:
        yield folder
    finally:
        folder.leave()
