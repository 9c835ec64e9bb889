"""A rollout worker in a real Ray actor: what is sent to it, and the group that nobody waits for any more."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from fakes import make_prompt
from pools import config

from tora.launch.ray_cluster import ray_session
from tora.types import Sampling


def make_engine(folder: Path) -> Callable[[], Any]:
    """Of an engine that generates until it is aborted, and leaves files: with its thread's policy when it is made,
    when it begins and when it ends."""

    def make() -> Any:
        print("first words", flush=True)
        (folder / f"policy_{os.sched_getscheduler(0)}").touch()
        from actors.abort import raise_if_aborted

        class Endless:
            def generate(self, requests: Sequence[Any]) -> Any:
                (folder / "began").touch()
                try:
                    while True:
                        raise_if_aborted()
                        time.sleep(0.01)
                finally:
                    (folder / "ended").touch()

            def close(self) -> None: ...

        return Endless()

    return make


def test_what_workers_are_sent_and_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancelled group ends in its engine, two workers share what they are sent, a node with other versions is named,
    what a process printed is kept, one that gives way does so, and a worker without room says so again and again."""
    from actors.ray_worker import RayWorker, ray_workers

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("actors.ray_worker.WARN_UNPLACED_EVERY_S", 0.5)
    monkeypatch.setattr("actors.ray_worker.installed", lambda: {"torch": "0.1"})
    pickled, kept, folder = [], list[str](), tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()  # a run's folder
    cfg = replace(config(1), output_dir=str(folder))

    class Tokenizer:
        """Says that it is pickled, which takes long for a large vocabulary."""

        def __reduce__(self) -> Any:
            pickled.append(1)
            return dict, ()

    class Rewarder:
        def close(self) -> None: ...

    async def wait_for(file: str) -> None:
        deadline = time.monotonic() + 20
        while not (tmp_path / file).exists():
            assert time.monotonic() < deadline, file
            await asyncio.sleep(0.02)

    async def use(workers: list[RayWorker], homeless: RayWorker) -> None:
        waiting = asyncio.ensure_future(homeless.start(60))
        await asyncio.gather(*(worker.start(60) for worker in workers))
        group = asyncio.ensure_future(workers[0].run_group(make_prompt(0)))
        await wait_for("began")
        group.cancel()
        await wait_for("ended")
        named = f"the node of a rollout worker has torch {version('torch').partition('+')[0]} where the driver has 0.1"
        assert caplog.messages.count(named) == 2
        kept.append(workers[1].keep_log())
        await asyncio.gather(*(worker.close() for worker in workers))
        caplog.clear()  # of what the others have said while they waited for their processes
        deadline = time.monotonic() + 20
        while sum("waiting for room" in said for said in caplog.messages) < 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        waiting.cancel()
        homeless.kill()

    with ray_session(2):
        sampling = Sampling(1)
        arguments = {
            "make_engine": make_engine(tmp_path),
            "make_rewarder": Rewarder,
            "tokenizer": Tokenizer(),
            "sampling": sampling,
            "eval_sampling": sampling,
            "group_size": 2,
            "seed": 0,
        }
        make = ray_workers(arguments, cfg, num_cpus=1, max_concurrency=4)
        unplaceable = ray_workers({}, cfg, num_cpus=1, resources={"nowhere": 1})
        asyncio.run(use([make(), make(gives_way=True)], unplaceable()))
    assert pickled == [1], "once for both"
    policies = {int(file.name.rpartition("_")[2]) for file in tmp_path.glob("policy_*")}
    assert policies == {os.SCHED_OTHER, os.SCHED_IDLE}
    (file,) = (folder / "logs").iterdir()
    assert kept == [f"what it printed is in {file}"] and "first words" in file.read_text()
