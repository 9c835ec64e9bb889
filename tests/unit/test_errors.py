"""Messages about other people's errors are never empty."""

from __future__ import annotations

from tora.errors import described


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
