"""What a Ray worker process printed, for as long as the run's folder lives: a private cluster's logs go with it."""

from __future__ import annotations

import os
from pathlib import Path

_KEPT_BYTES = 1 << 16
"""The end of each of the two streams."""


def keep_log(pid: int, output_dir: str, name: str) -> str:
    """Copies what a process of this run's private cluster has printed to `logs/NAME.txt` in the run's folder.

    Returns a clause that names the file. Empty if the process printed nothing, if the file cannot be written, if the
    folder is not a run's yet, and on a cluster that the run has joined, which keeps its logs itself.
    """
    import ray._private.worker

    node = ray._private.worker._global_node
    is_run = Path(output_dir, "config.yaml").exists()
    if node is None or "RAY_ADDRESS" in os.environ or not is_run:
        return ""
    folder, kept = Path(node.get_logs_dir_path()), Path(output_dir) / "logs" / f"{name}.txt"
    try:
        text = "".join(map(_end, sorted(folder.glob(f"worker-*-{pid}.*"))))
        if not text:
            return ""
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text)
    except OSError:
        return ""
    return f"what it printed is in {kept}"


def _end(file: Path) -> str:
    """Without Ray's own marks, such as `:actor_name:RolloutActor`."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _KEPT_BYTES))
        lines = stream.read().decode(errors="replace").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith((":job_id:", ":actor_name:", ":task_name:")))
