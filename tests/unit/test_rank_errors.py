"""What the errors of a learner rank become before they cross to the driver."""

from __future__ import annotations

import pickle

import pytest
from safetensors import SafetensorError

from learner.rank_errors import told
from tora.errors import ComponentError, LearnerLost, TrainingError


class NeedsTwo(Exception):
    """Does not unpickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} of {second}\nand more")


_GONE = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:45121",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:3412: Connection reset by peer",
    "NCCL communicator was aborted on rank 1.",
)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (NeedsTwo("none", "them"), TrainingError, "a learner rank failed: NeedsTwo: none of them (" + __file__),
        (AssertionError(), TrainingError, "a learner rank failed: AssertionError: AssertionError"),
        (RuntimeError("shapes differ"), TrainingError, "RuntimeError: shapes differ"),
        (ComponentError("loss: my.Loss raised"), ComponentError, "loss: my.Loss raised"),
        (OSError(28, "No space left on device"), OSError, "No space left"),
        (SafetensorError("I/O error"), SafetensorError, "I/O error"),
        *((RuntimeError(text), LearnerLost, "a rank has lost another (RuntimeError: ") for text in _GONE),
    ],
)
def test_an_error_crosses_as_one_that_the_driver_can_read(
    error: Exception, kind: type[Exception], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(kind) as caught, told():
        raise error
    assert words in str(caught.value) and type(pickle.loads(pickle.dumps(caught.value))) is kind
    assert "\n" not in str(caught.value)
    assert (caught.value is error) == (error.__class__ is kind), "others are printed where they were raised"
    assert ("Traceback" in capfd.readouterr().err) == (caught.value is not error)
