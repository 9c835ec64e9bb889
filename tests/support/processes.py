"""A run of the quick-start in a process group of its own, for tests that send it signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OVERRIDES = ["batch_size=4", "grpo_samples=4", "eval=null", "dtype=fp32"]


@contextmanager
def tora_run(folder: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """`tora run quickstart` as a terminal would start it; its output goes to `folder` with the suffix `.log`.

    It has no evaluations, so each row of its metrics is a training step. Ends the run if it is still going. Raises
    AssertionError if it leaves temporary files.
    """
    words = [*_OVERRIDES, f"output_dir={folder}", *overrides]
    scratch = tempfile.mkdtemp(dir="/tmp")  # short: Ray puts sockets below it, and their paths are limited
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tora", "run", "quickstart", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TMPDIR": scratch},
        )
        try:
            yield child
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait(60)
            left = [file.name for file in Path(scratch).glob("tora-*")]
            shutil.rmtree(scratch, ignore_errors=True)
        assert not left


def wait_for(holds: Callable[[], Any], child: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Returns once `holds()` does; raises AssertionError if the run ends first or time is up."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert child.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
