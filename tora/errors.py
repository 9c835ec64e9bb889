"""The error hierarchy. Every error pickles, so that it keeps its type across processes."""

import difflib
import pickle
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_NOT_THE_USERS = (
    "/tora/rewards/rewarder.py",
    "/tora/config/components.py",
    "/tora/config/calls.py",
    "/site-packages/",
    "/lib/python3",
    "<frozen",
)
"""Parts of the paths of files in which an error is not the user's to find."""


class ToraError(Exception):
    """Base of all errors that Tora raises deliberately."""


class ConfigError(ToraError, ValueError):
    """The user's input is wrong: reported as one sentence, without a traceback, and with exit code 2."""


class OverlongPrompt(ConfigError):
    """A prompt is too long and is dropped; the next one takes its turn."""


class SyncError(ToraError, RuntimeError):
    """An engine does not hold the snapshot that the learner sent."""


class RolloutError(ToraError, RuntimeError):
    """A rollout worker, or the rollout side as a whole, cannot continue."""


class WorkerLost(RolloutError):
    """A rollout worker died, hung or broke; another worker has to repeat its work."""


class SnapshotLost(WorkerLost):
    """A snapshot went with the learner that held it, as with its node. The worker that was to load it is sound."""


class ImageLost(WorkerLost):
    """An image went with the process that kept it, which is being replaced. The worker that was to show it is sound."""


class TrainingError(ToraError, RuntimeError):
    """Training cannot continue: its values are no longer finite."""


class ComponentError(ToraError, RuntimeError):
    """Code that the config names raised in the middle of a run."""


class LearnerLost(ToraError, RuntimeError):
    """A learner rank died, which stops all ranks; the run may continue from a checkpoint."""


def nearest(word: str, options: Iterable[str]) -> str:
    """A clause for the end of a sentence that names the option most like `word`; empty if there are no options."""
    names = list(options)
    by_case = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), by_case, n=1, cutoff=0.0)
    return f"; the nearest is {by_case[close[0]]}" if close else ""


def described(error: BaseException) -> str:
    """The error's message, or its type and place if it has none, like the assertions of other libraries."""
    if str(error):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return f"{type(error).__name__}{place}"


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def place_of(error: BaseException) -> str:
    """Where it was raised, in parentheses: the innermost line that is not of a library; empty if unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _NOT_THE_USERS)]
    if not own:
        return ""
    line = f": {own[-1].line}" if own[-1].line else ""
    return f" ({own[-1].filename}, line {own[-1].lineno}{line})"


def raised(error: BaseException) -> str:
    """An error of a user's code: its type, the first line of its message, and its place."""
    return f"{type(error).__name__}: {first_line(error)}{place_of(error)}"


def portable(error: BaseException) -> Exception:
    """The error if any process can read it, else one of ours with its type and message as text.

    An error class of a library or of a user's module may not pickle, or its module may be missing elsewhere.
    """
    ours = type(error).__module__ == "builtins" or type(error).__module__ == __name__
    if ours and isinstance(error, Exception):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:  # its arguments may be anything
            pass
    kind = RolloutError if isinstance(error, RuntimeError | MemoryError | OSError) else ToraError
    return kind(f"{type(error).__name__}: {described(error)}")


@contextmanager
def portable_errors() -> Iterator[None]:
    """Raises errors as `portable` makes them."""
    try:
        yield
    except Exception as error:
        if (sent := portable(error)) is error:
            raise
        raise sent from None
