"""A run's Ray cluster: the one that RAY_ADDRESS names, or else a private one on loopback."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from tora.distributed.device import machine_memory
from tora.errors import ConfigError, ToraError

_GROUPS_BYTES = 2**30
"""Of shared memory, for groups and batches."""
_VERSIONS = 5
"""Snapshots that are held at a time: the newest, the one before it that workers still fetch, both while they are
written and read, and one that is being evaluated."""
_log = logging.getLogger(__name__)
_LONGEST = 300
"""Characters of what Ray says of a node or worker."""
_RAYS_SHARE = 0.3
"""Of the machine's memory, that Ray takes by default."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keep 127.0.0.1, do not replace it by the network address
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def ray_session(num_cpus: int, *, snapshot_bytes: int | None = 0, scratch: Path | None = None) -> Iterator[None]:
    """Connects to the run's cluster. The arguments size and place a private one.

    `num_cpus`: what all Ray actors together request. `snapshot_bytes`: of one sync, None if not known; it sizes the
    object store. `scratch`: the folder for its files; null: a new one.

    Raises ConfigError if nobody answers at RAY_ADDRESS, and ToraError if it is no cluster that can be joined.
    """
    # of two ranks that fail together the first is told; Ray would print what the other raised
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.pop("RAY_ADDRESS", None)  # empty, which is as good as not set
    joins_existing = "RAY_ADDRESS" in os.environ
    if joins_existing:
        check_answers(os.environ["RAY_ADDRESS"])
    if not joins_existing:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if "RAY_AUTH_MODE" not in os.environ:
            # Ray's agent runs any job that it is sent. A token keeps out other users of this machine.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    import ray._private.worker

    ray._private.worker.print_to_stdstream = _say_shortly  # where Ray prints what its raylets tell of errors
    if joins_existing:
        with _own_signals():
            _join()
        try:
            yield
        finally:
            ray.shutdown()
        return
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    # Ray reads these variables at its first import, which may have happened before they were set.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    # holds sockets, whose paths must be short
    folder = Path(tempfile.mkdtemp(prefix="tora-")) if scratch is None else scratch / "ray"
    try:
        with _own_signals():
            ray.init(
                num_cpus=max(os.cpu_count() or 1, num_cpus),
                object_store_memory=object_store_bytes(snapshot_bytes, machine_memory(torch.device("cpu"))),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
            )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def check_answers(address: str, patience_s: float = 3.0) -> None:
    """Raises ConfigError if no server listens at Ray's address, for which Ray itself waits for many minutes.

    `address`: as RAY_ADDRESS has it. `patience_s`: how long it is tried again.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local") or "/" in host:  # the scheme of a service that Ray knows
        return
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"RAY_ADDRESS={address} is neither auto nor a cluster's host and port, such as head:6379.")
    end = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(1.0, patience_s)).close()
            return
        except OSError as error:
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            raise ConfigError(
                f"RAY_ADDRESS={address} cannot be reached: {error}; start Ray there, or unset RAY_ADDRESS for a "
                "cluster of the run's own."
            ) from error


def _say_shortly(told: dict[str, Any], *args: object, **options: object) -> None:
    """The first line of each message. The rest is the last part of a raylet's log, dozens of lines."""
    for message in told["lines"]:
        _log.warning("Ray says: %s", next(iter(str(message).splitlines()), "")[:_LONGEST])


def _join() -> None:
    import ray

    try:
        ray.init(log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ToraError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined: {reason}") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM, in whose place `ray.init` of 2.60 puts two others.

    The first is a Python function that exits. The second comes with the core worker, for crashes in C++, and takes
    SIGTERM for one: it prints the stack of C++, calls the handler before it, and aborts the process 3 s later.
    """
    from ray._private import utils

    theirs, ours = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    if not callable(ours):
        yield
        return
    utils.set_sigterm_handler = lambda sigterm_handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        signal.signal(signal.SIGTERM, ours)


def gpus_per_device(num_wanted: int, device: Literal["auto", "cpu", "cuda"], *, whole: bool = False) -> float:
    """The number of GPUs for each of the `num_wanted` devices that a run needs.

    1 if the cluster has enough, 1/n with n devices on a GPU if it has fewer, and 0 if it has none or `device` is `cpu`.
    With `cuda` and no GPU yet, or with `whole`, it is 1: the cluster may still be adding nodes.
    """
    import ray

    if whole and device != "cpu":
        return 1.0

    total = ray.cluster_resources().get("GPU", 0.0)
    if device == "cpu" or (total == 0 and device == "auto"):
        return 0.0
    # A device cannot span two GPUs, so that a share must fit a whole number of times into one.
    return 1 / math.ceil(num_wanted / total) if 0 < total < num_wanted else 1.0


Role = Literal["learner", "rollout"]


def role_resources(role: Role, marked: bool | None = None) -> dict[str, float]:
    """The custom resource that places a Ray actor on the nodes meant for its role: those started with the resource
    `tora_learner` or `tora_rollout`. `marked`: whether there are such nodes, now or soon; None to look."""
    import ray

    name = f"tora_{role}"
    marked = name in ray.cluster_resources() if marked is None else marked
    return {name: 0.001} if marked else {}


def is_submitted_job() -> bool:
    """Whether this process is the program of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by Ray for a job's program


def output_folder(output_dir: str) -> Path:
    """`output_dir` as an absolute path. A relative one is relative to TORA_OUTPUT_ROOT or the working directory.

    The working directory of a submitted job is a copy that Ray deletes, so a job uses the home folder instead.
    """
    root = os.environ.get("TORA_OUTPUT_ROOT") or (Path.home() if is_submitted_job() else Path.cwd())
    return (Path(root) / Path(output_dir).expanduser()).absolute()


def object_store_bytes(snapshot_bytes: int | None, machine: int | None) -> int | None:
    """The size of a private cluster's object store; None for Ray's default, which is the most that it gets.

    `machine`: bytes of memory, None if not known.
    """
    if snapshot_bytes is None:
        return None
    needed = _GROUPS_BYTES + _VERSIONS * snapshot_bytes
    return needed if machine is None or needed <= _RAYS_SHARE * machine else None
