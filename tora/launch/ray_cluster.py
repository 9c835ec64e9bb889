"""A Ray cluster for the length of a run: the one that RAY_ADDRESS names, else a private one on loopback."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_OBJECT_STORE_BYTES = 1 << 30
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 stays what it is, not the network card's address
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def ray_session(num_cpus: int, *, big_objects: bool = False) -> Iterator[None]:
    """For a private cluster. `num_cpus`: what all Ray actors together ask for; `big_objects`: whole models, for which
    Ray's own share of the memory is set aside in place of a gigabyte."""
    joins = "RAY_ADDRESS" in os.environ
    if not joins:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if (
            "RAY_AUTH_MODE" not in os.environ
        ):  # Ray's agent runs what it is sent: other users of this machine are kept out
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    if joins:
        ray.init(log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    # Ray reads these variables when it is first imported, which may have been before.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    scratch = tempfile.mkdtemp(prefix="tora-")  # sockets live here, and their paths must be short
    ray.init(
        num_cpus=max(os.cpu_count() or 1, num_cpus),
        object_store_memory=None if big_objects else _OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=scratch,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def gpus_each(num_wanted: int, device: Literal["auto", "cpu", "cuda"]) -> float:
    """What each of `num_wanted` gets: a GPU where the cluster has enough, an equal part where not, none without GPUs or
    on `cpu`.

    On `cuda` one each where there is none yet: a cluster's nodes may be on their way.
    """
    import ray

    total = ray.cluster_resources().get("GPU", 0.0)
    if device == "cpu" or (total == 0 and device == "auto"):
        return 0.0
    return total / num_wanted if 0 < total < num_wanted else 1.0


Role = Literal["learner", "rollout"]


def role_resources(role: Role) -> dict[str, float]:
    """What a Ray actor asks for to land on the nodes meant for its role: those that were started with the resource
    `tora_learner` or `tora_rollout`. Nothing where no node was."""
    import ray

    name = f"tora_{role}"
    return {name: 0.001} if name in ray.cluster_resources() else {}


def output_folder(output_dir: str) -> Path:
    """The absolute folder behind `output_dir`; a relative one starts at TORA_OUTPUT_ROOT or the working directory.

    A submitted job's working directory is a copy that Ray deletes: there it starts at the home folder instead.
    """
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # Ray's, for the program that a job runs
    root = os.environ.get("TORA_OUTPUT_ROOT") or (Path.home() if is_job else Path.cwd())
    return (Path(root) / Path(output_dir).expanduser()).absolute()
