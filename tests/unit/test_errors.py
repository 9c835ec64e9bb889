"""Messages about other people's errors are never empty."""

from __future__ import annotations

import pickle

import pytest

from tora.errors import RolloutError, SyncError, ToraError, described, portable, portable_errors


def test_an_error_without_a_message_is_described_by_its_place() -> None:
    assert described(ValueError("too long")) == "too long"
    assert described(KeyboardInterrupt()) == "KeyboardInterrupt"
    dtype = "float32"
    try:
        assert dtype == "float16"
    except AssertionError as error:
        error.args = ()  # pytest fills in a message
        words = described(error)
    assert words.startswith("AssertionError in ") and __file__ in words and 'assert dtype == "float16"' in words


class NeedsTwo(RuntimeError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class OfAModule(ValueError):
    """Pickles, but another process may lack this module."""


def test_errors_that_do_not_pickle_cross_processes_as_text() -> None:
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(NeedsTwo("a", "b")))
    sent = [
        portable(e) for e in (NeedsTwo("a", "b"), KeyError("k"), ValueError(lambda: 0), SystemExit(3), SyncError("s"))
    ]
    assert [type(e) for e in sent] == [RolloutError, KeyError, ToraError, ToraError, SyncError]
    assert str(sent[0]) == "NeedsTwo: a and b" and str(sent[3]) == "SystemExit: 3"
    assert all(str(pickle.loads(pickle.dumps(e))) == str(e) for e in sent)
    assert type(portable(OfAModule("x"))) is ToraError and str(portable(OfAModule("x"))) == "OfAModule: x"
    with pytest.raises(RolloutError, match="NeedsTwo"), portable_errors():
        raise NeedsTwo("a", "b")
