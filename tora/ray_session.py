"""A Ray cluster for the length of a run: the one that RAY_ADDRESS names, else a private one on loopback."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECT_STORE_BYTES = 1 << 30
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then keeps 127.0.0.1 instead of the network card's address
    "RAY_AUTH_MODE": "disabled",  # a token file would be written to the home folder; nothing listens off loopback
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def ray_session(num_actors: int) -> Iterator[None]:
    """`num_actors`: Ray actors of one CPU each that a private cluster must have room for."""
    joins = "RAY_ADDRESS" in os.environ
    if not joins:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    import ray

    if joins:
        ray.init(log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    scratch = tempfile.mkdtemp(prefix="tora-")  # sockets live here, and their paths must be short
    ray.init(
        num_cpus=max(os.cpu_count() or 1, num_actors),
        object_store_memory=_OBJECT_STORE_BYTES,
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


def gpus_each(num_actors: int) -> float:
    """A GPU each where the cluster has enough, an equal part where not, none without GPUs."""
    import ray

    total = ray.cluster_resources().get("GPU", 0)
    return 1.0 if total >= num_actors else total / num_actors
