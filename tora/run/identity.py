"""A run's identity: one id from its first step to its last, whatever process continues it. It is in the folder's
`config.yaml`, in every checkpoint, in the exported adapter, and names the run for metric loggers."""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path

import yaml

from tora.config.load import RUN_ID, dump_yaml
from tora.config.schema import RunConfig
from tora.errors import ConfigError

CONFIG = "config.yaml"
IDENTITY = "tora_run.json"
"""In the folder of an exported policy: which run exported it, and after how many steps."""


def result_name(cfg: RunConfig) -> str:
    """The folder in the output folder that the trained policy is exported into."""
    return "model" if cfg.model.lora_type == "full" else "adapter"


def new_run_id() -> str:
    """Such as `20261126-071500-3f9a1c`: the time of the start and three random bytes, in letters that every logger
    takes."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def run_id_in(folder: Path) -> str | None:
    """The id of the run in an output folder; None if there is no run, or one that has none."""
    try:
        tree = yaml.safe_load((folder / CONFIG).read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read: {str(error).splitlines()[0]}.") from error
    return str(tree[RUN_ID]) if isinstance(tree, dict) and tree.get(RUN_ID) else None


def write_config(folder: Path, cfg: RunConfig, run_id: str) -> None:
    """Write `config.yaml` under a temporary name and rename it, so that a crash leaves the old one or the new one."""
    aside = folder / f".{CONFIG}"
    aside.write_text(f"{RUN_ID}: {run_id}\n{dump_yaml(cfg)}")
    os.replace(aside, folder / CONFIG)


def is_finished(exported: Path, num_steps: int) -> bool:
    """Whether the run has exported its last step's policy, or that of a later step, into the folder `exported`."""
    try:
        return json.loads((exported / IDENTITY).read_text())["step"] >= num_steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_identity(exported: Path, run_id: str, step: int) -> None:
    """`step`: the policy version in the folder."""
    if exported.is_dir():
        (exported / IDENTITY).write_text(json.dumps({RUN_ID: run_id, "step": step}) + "\n")
