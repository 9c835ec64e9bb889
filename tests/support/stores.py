"""What Ray's object store holds."""

from __future__ import annotations

import time
from collections.abc import Callable


def stored_mib() -> int:
    import ray
    from ray._private.internal_api import memory_summary

    summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    (line,) = [line for line in summary.splitlines() if "Plasma memory usage" in line]
    return int(line.split("usage ")[1].split(" MiB")[0])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, stored_mib()
        time.sleep(0.1)
