"""A disk that takes no more files: one sentence about what is whole, and how to go on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from tora.errors import ToraError, first_line
from tora.run.checkpoints import Checkpoints

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class DiskError(ToraError, OSError):
    """The run's folder cannot be written to any more."""


def is_full(error: BaseException) -> bool:
    """Whether the error says that a disk has no room, or can no longer be written to."""
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):  # it has the system's error as text only
        return any(f"os error {number}" in str(error) for number in _FULL)
    return isinstance(error, OSError) and error.errno in _FULL


@contextmanager
def disk_errors(folder: str, checkpoints: Checkpoints) -> Iterator[None]:
    """Raises DiskError if the disk of the run's folder is full or broken."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ToraError) or not is_full(error):
            raise
        newest = checkpoints.newest()
        whole = "there is no checkpoint"
        if newest is not None:
            whole = f"{newest.name} is whole, and resume_from_checkpoint=true continues from it once there is room"
        raise DiskError(f"output_dir={folder} takes no more files: {first_line(error)}; {whole}.") from error
