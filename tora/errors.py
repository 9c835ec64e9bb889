"""One small hierarchy; every error pickles, so it crosses processes as itself."""

import difflib
from collections.abc import Iterable


class ToraError(Exception):
    """Base of all errors that Tora raises on purpose."""


class ConfigError(ToraError, ValueError):
    """The user's input is wrong; one sentence, exit code 2, no traceback."""


class SyncError(ToraError, RuntimeError):
    """A snapshot did not arrive whole in an engine."""


class RolloutError(ToraError, RuntimeError):
    """A rollout worker cannot go on."""


class WorkerLost(RolloutError):
    """A rollout worker died, hangs or is broken; what it was doing is to be done again elsewhere."""


class LearnerLost(ToraError, RuntimeError):
    """A learner rank died, and with it the group; the run may go on from a checkpoint."""


def nearest(word: str, options: Iterable[str]) -> str:
    """A clause that names the option most like `word`, to end a sentence with; empty without options."""
    names = list(options)
    by_case = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), by_case, n=1, cutoff=0.0)
    return f"; the nearest is {by_case[close[0]]}" if close else ""
