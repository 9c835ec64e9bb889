"""Rows for a prompt process. It imports this module alone."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import numpy as np

from tora.errors import ConfigError, OverlongPrompt
from tora.models.vision.encoded_image import EncodedImage
from tora.types import Prompt

MIB = 1 << 20
LONG, WRONG, ODD, WARNED, PID = 3, 5, 7, 9, 1000
"""Positions whose rows are too long, are a mistake of the user's, raise an error of the user's own, warn, and say which
process makes them."""


class OddError(Exception):
    def __init__(self, one: int, two: int) -> None:  # does not unpickle
        super().__init__(f"{one} and {two}")


def image(position: int, size: int, seed: int = 0) -> EncodedImage:
    return EncodedImage(np.random.default_rng([seed, position]).bytes(size))


def make(position: int) -> Prompt:
    """With a large image, which the object store gets, and a small one."""
    if position == LONG:
        raise OverlongPrompt("row 3 is too long")
    if position == WRONG:
        raise ConfigError("row 5 has no prompt")
    if position == ODD:
        raise OddError(1, 2)
    if position == WARNED:
        logging.getLogger("tora.of_a_test").warning("row %d is cut", position)
    if position == PID:
        return Prompt(position, (1,), str(os.getpid()), {})
    return Prompt(
        position, (position, 1), "text", {"answer": str(position)}, (image(position, MIB), image(position, 40))
    )


def kills(position: int) -> Prompt:
    print("its last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return make(position)


def draws(file: Path, position: int) -> Prompt:
    """Another image each time."""
    with file.open("a") as calls:
        calls.write("x")
    return Prompt(position, (1,), str(os.getpid()), {}, (image(position, 40, seed=file.stat().st_size),))


def sleeps(position: int) -> Prompt:
    time.sleep(3600)
    return make(position)
