"""Runs functions on two ranks, in processes that serve many tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp
from ports import free_ports

from tora.distributed.process_group import end_rank, leave

RANKS = 2
TIME_LIMIT_S = 500


class RankProcesses:
    """`RANKS` processes, started at the first call and reused, so that each test does not import torch anew."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., None], *args: Any) -> None:
        """Calls `function(*args)` on every rank, with torchrun's variables set and no process group yet.

        Raises AssertionError with the rank's traceback if one fails, or if it takes longer than `TIME_LIMIT_S`.
        """
        if not self._processes:
            self._start()
        (port,) = free_ports(1)
        for pipe in self._pipes:
            pipe.send((port, function, args))
        for rank, pipe in enumerate(self._pipes):
            failure = self._failure_of(pipe)
            if failure is not None:
                self.close()  # the other rank may wait for this one
                raise AssertionError(f"rank {rank} failed: {failure}")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    @staticmethod
    def _failure_of(pipe: Connection) -> str | None:
        try:
            return pipe.recv() if pipe.poll(TIME_LIMIT_S) else f"no answer within {TIME_LIMIT_S} s"
        except EOFError:
            return "its process died"


def _serve(rank: int, pipe: Connection) -> None:
    fixed = {"WORLD_SIZE": str(RANKS), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {**fixed, "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    while True:
        try:
            port, function, args = pipe.recv()
        except EOFError:
            end_rank(0)
        os.environ["MASTER_PORT"] = str(port)
        try:
            function(*args)
            leave()
        except Exception:
            pipe.send(traceback.format_exc())
            end_rank(1)
        pipe.send(None)
