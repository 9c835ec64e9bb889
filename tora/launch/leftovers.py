"""What a run must not leave behind, and the process that sees to it; see `tora.launch.sweeper`."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tora.launch import sweeper

_LONGEST_BASE = 32
"""Characters. Ray's sockets lie below the scratch folder, and a socket's path is limited to 107."""


class Leftovers:
    """A run's scratch folder, in which all its temporary files lie, and the run's sweeper."""

    def __init__(self) -> None:
        """Starts the sweeper. This process and its children use the scratch folder as TMPDIR from now on."""
        base = tempfile.gettempdir()
        # compiled kernels are worth keeping from run to run
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(base, f"torchinductor_{os.getuid()}"))
        short = base if len(base) <= _LONGEST_BASE or not os.access("/tmp", os.W_OK) else "/tmp"
        self.scratch = Path(tempfile.mkdtemp(prefix="tora-", dir=short))
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.scratch)
        mark = os.environ[sweeper.MARK] = secrets.token_hex(16)
        self._sweeper = subprocess.Popen(
            [sys.executable, "-I", "-S", sweeper.__file__, str(os.getpid()), mark, str(self.scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def delete(self, path: Path) -> None:
        """Have a folder deleted at the end of the run."""
        self._tell(f"delete {path}\n")

    def remove(self, limit_s: float) -> None:
        """Remove everything. Waits for it, at most `limit_s` seconds; what is left then goes soon after."""
        self._tell("end\n")
        with suppress(subprocess.TimeoutExpired):
            self._sweeper.wait(limit_s)

    def _tell(self, line: str) -> None:
        assert self._sweeper.stdin is not None
        with suppress(OSError):  # somebody has killed it; then nobody cleans up
            self._sweeper.stdin.write(line.encode())
            self._sweeper.stdin.flush()
