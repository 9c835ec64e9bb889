"""Where an asynchronous run's training prompts are made: in threads of the driver, or in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from actors.prompt_process import PromptProcess
from actors.prompts_ahead import PromptMaker, PromptSource, Read
from tora.batching.stored_images import LEAST_BYTES, stored
from tora.config.components import registered, restore
from tora.config.schema import RunConfig
from tora.distributed.ray_logs import keep_log
from tora.errors import ConfigError
from tora.launch.engines import of_turns
from tora.tasks.prompts import RunPrompts


def prompt_source(cfg: RunConfig, prompts: RunPrompts) -> PromptSource:
    """As `prompt_process` has it. Raises ConfigError if a process is asked for that could not read the dataset."""
    is_object = bool(registered([cfg.dataset]))
    if is_object and cfg.prompt_process:
        raise ConfigError(
            "prompt_process=true needs a dataset that the config names, and this one is an object in Python"
        )
    if cfg.prompt_process or (cfg.prompt_process is None and not is_object and _has_large_images(prompts)):
        return PromptProcess(
            partial(_reading, replace(cfg, eval=None), registered(of_turns(cfg))),
            cfg.import_from or (),
            start_timeout_s=cfg.rollout.start_timeout_s,
            heartbeat_s=cfg.rollout.heartbeat_s,
            keep_log=lambda pid: keep_log(pid, cfg.output_dir, f"prompt_process_{pid}"),
        )
    return PromptMaker(lambda position: partial(stored, prompts.read(position)))


def _has_large_images(prompts: RunPrompts) -> bool:
    """Whether those of the first prompt are among the ones that the object store gets."""
    return prompts.image_token is not None and any(len(image) >= LEAST_BYTES for image in prompts.first(1)[0].images)


def _reading(cfg: RunConfig, objects: Mapping[str, Callable[..., Any]]) -> Read:
    """In another process, with this program's functions and classes among tools and environments."""
    restore(objects)
    return RunPrompts(cfg).read
