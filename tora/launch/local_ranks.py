"""A synchronous run of several ranks on this machine: torchrun in this process, which hands each stop on once."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from tora.launch.signals import Stop

_HAND_ON_S = 0.1
"""Seconds between two looks for ranks that have not been told to stop."""


def run_ranks(words: Sequence[str], count: int, stop: Stop | None) -> int:
    """Run `python WORDS` in `count` ranks; the exit code of the first one that fails, or 0.

    A rank reports its own errors. torchrun would take a signal itself, end the ranks and fail with a traceback.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if stop is not None:
        stop.let_save(True)
        threading.Thread(target=_hand_on, args=(stop,), daemon=True).start()
    # it must handle some signal; this one is never sent
    options = ["--standalone", f"--nproc_per_node={count}", "--signals-to-handle=SIGUSR2"]
    logging.disable(logging.CRITICAL)  # torchrun's own reports of a rank that failed
    try:
        run.run(run.parse_args([*options, *words]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"rank {rank} was killed by {name}, which ended the others", file=sys.stderr)
            return 1
        return failure.exitcode
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _hand_on(stop: Stop) -> None:
    """Once a stop is requested, tell every rank, also one that starts later."""
    told: set[int] = set()
    while True:
        time.sleep(_HAND_ON_S)
        if not stop.requested:
            continue
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.pid not in told and "tora" in child.cmdline():
                    child.send_signal(signal.SIGTERM)
                    told.add(child.pid)
