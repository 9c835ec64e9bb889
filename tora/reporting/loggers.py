"""Metric loggers of a run: torchtune's, Tora's own, or the user's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tora.config.components import instantiate, locate
from tora.config.load import to_dict
from tora.config.schema import Component, RunConfig
from tora.config.secrets import redacted
from tora.errors import ConfigError, first_line


class Logger(Protocol):
    """The interface of torchtune's metric loggers. One with a `log_config` is given the config before anything else."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def build_logger(component: Component, cfg: RunConfig, folder: Path, run_id: str) -> Logger:
    """The component's logger, with the run's config.

    Parameters called `log_dir`, `run_id` and `run_name` get the run's folder, id and name unless the component sets
    them (for `log_dir` also as `dir`). Weights & Biases gets id and name as `wandb.init` calls them, so that a resumed
    run goes on in the same place. Raises ConfigError if the logger cannot be made, without a login for instance.
    """
    target = locate(component["_component_"])
    parameters = inspect.signature(target).parameters
    values: dict[str, Any] = {"run_id": run_id, "run_name": cfg.name}
    if "dir" not in component:
        values["log_dir"] = str(folder)
    values = {name: value for name, value in values.items() if name in parameters}
    if getattr(target, "__name__", "") == "WandBLogger":
        # a resumed run may have other settings than it started with
        values |= {"id": run_id, "resume": "allow", "name": cfg.name, "allow_val_change": True}
    try:
        logger = instantiate({**values, **component})
        if (log_config := getattr(logger, "log_config", None)) is not None:
            from omegaconf import OmegaConf

            log_config(OmegaConf.create(redacted(to_dict(cfg), references=False)))
    except ConfigError:
        raise
    except Exception as error:  # each service's client raises errors of its own
        said = first_line(error)
        raise ConfigError(f"metric_logger {component['_component_']} cannot start: {said}") from error
    return logger
