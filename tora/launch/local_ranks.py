"""A synchronous run of several ranks on this machine: a process for each, which meet on loopback under a secret."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tora.distributed.process_group import STORE_KEY
from tora.launch.signals import STOPPED, Stop

_LOOK_EVERY_S = 0.1
END_S = 20.0
"""Seconds for ranks to end, once one has ended too early, before they are made to."""
_INTERFACES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Where ranks listen for each other's data, unless the environment says otherwise."""


def run_ranks(words: Sequence[str], count: int, stop: Stop | None) -> int:
    """Run `python WORDS` in `count` ranks; the exit code of the first one that fails, or 0.

    A rank reports its own errors. A stop is handed on once: a terminal's Ctrl-C reaches this process alone.
    """
    if stop is not None:
        stop.let_save(True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **_INTERFACES,
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        STORE_KEY: secrets.token_hex(32),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    told: set[int] = set()
    try:
        for rank in map(str, range(count)):
            variables, command = {**shared, "RANK": rank, "LOCAL_RANK": rank}, [sys.executable, "-u", *words]
            ranks.append(subprocess.Popen(command, env=variables, start_new_session=True))
        while (running := _running(ranks)) and not _failed(ranks):
            for rank in running if stop is not None and stop.requested else ():
                if rank.pid not in told:
                    told.add(rank.pid)
                    rank.send_signal(signal.SIGTERM)
            time.sleep(_LOOK_EVERY_S)
        failed = _failed(ranks)
    finally:
        _end(ranks)
    number, code = failed[0] if failed else (0, 0)
    if code < 0 and not (stop is not None and stop.requested):
        name = signal.Signals(-code).name
        print(f"rank {number} was killed by {name}, which ended the others", file=sys.stderr)
    return 1 if code < 0 else code


def _running(ranks: Sequence[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    return [rank for rank in ranks if rank.poll() is None]


def _failed(ranks: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Numbers and exit codes of the ranks that have failed, first those that a signal ended: others fail of that."""
    codes = [(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode]
    return sorted(codes, key=lambda failure: failure[1])


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that are running. Where one has stopped as it was asked to, the others are about to."""
    has_stopped = any(code == STOPPED for _, code in _failed(ranks))
    for number in (0, signal.SIGTERM, signal.SIGKILL) if has_stopped else (signal.SIGTERM, signal.SIGKILL):
        for rank in _running(ranks):
            rank.send_signal(number)
        deadline = time.monotonic() + END_S
        while _running(ranks) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
