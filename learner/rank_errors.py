"""What the errors of a learner rank become on their way to the driver, which may lack the modules that define them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from tora.errors import LearnerLost, ToraError, TrainingError, first_line, place_of

_BROKEN = re.compile(r"gloo/transport|NCCL|ncclRemoteError|Connection (closed|reset|refused)|Broken pipe")


@contextmanager
def told() -> Iterator[None]:
    """Passes on Tora's errors, and those of files, which leave out a checkpoint. Another, as of a user's loss, becomes
    a TrainingError of one sentence that says where it was raised, after its traceback is printed. One that says that
    another rank is gone becomes LearnerLost, long before the cluster may notice the other's death.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ToraError | SafetensorError):
            raise
        if isinstance(error, OSError) and type(error).__module__ == "builtins":
            raise
        traceback.print_exception(error)
        sentence = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, RuntimeError) and _BROKEN.search(str(error)):
            raise LearnerLost(f"the learner is lost: a rank has lost another ({sentence})") from None
        raise TrainingError(f"a learner rank failed: {sentence}{place_of(error)}") from None
