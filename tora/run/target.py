"""What `tora eval` and `tora export` work on: a run, an adapter or a model, as a config and a place of its weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tora.adapters.peft_config import CONFIG_FILE, PeftConfig, read_peft_config
from tora.adapters.peft_format import TOWER_LINEARS
from tora.config.load import config_file, is_hub_name, load_config, read_tree
from tora.config.schema import ModelConfig, RunConfig
from tora.errors import ConfigError
from tora.models.hub import fetched
from tora.models.names import TOWERS
from tora.run.checkpoints import Checkpoints, damage_of, step_of

Tree = Mapping[str, Any]
_ALONE: dict[str, Any] = {
    "async_rl": False,
    "learner_ranks": 1,
    "fsdp_cpu_offload": False,
    "compile": False,
    "resume_from_checkpoint": False,
    "share_prefix": None,
    "whole_gpus": False,
    "marked_nodes": False,
    "step_parts": None,
}
_ROLLOUT: dict[str, Any] = {
    "num_workers": 1,
    "min_workers": None,
    "max_workers": None,
    "stragglers": "wait",
    "tensor_parallel": 1,
    "update": "between_rollouts",
    "recompute_kv": False,
    "partial": None,
    "base": "dequantized",
}
"""Keys of a run that one process without training does not need."""


@dataclass(frozen=True, slots=True)
class Target:
    """A policy to evaluate or to export."""

    cfg: RunConfig
    """For one process; `model.path` is a folder, and `model.adapter_path` that of a trained adapter."""
    run: Path | None
    """The run's folder, for a run and for an adapter in one."""
    checkpoint: Path | None
    """Weights to restore over those that `cfg.model` names."""
    step: int | None
    """Of the checkpoint, or the run's last; None where it is not known."""
    label: str
    """Short, for file names."""
    whole: Path | None = None
    """The folder of a whole model that a run has exported; `cfg.model` then adds an adapter without effect."""
    trained: RunConfig | None = None
    """The config that it was trained with, where that is another."""


def find(
    target: str,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | None = None,
    config: str | None = None,
    tree: Tree | None = None,
) -> Target:
    """`target`: a run's folder, a PEFT folder, a model's folder or the name of a model on the hub. `checkpoint`: a step
    of the run, or `best`. `config`: for an adapter or a model without a run. `tree`: keys that replace the config's.

    Raises ConfigError if it is none of these, or the run has no such checkpoint.
    """
    folder = Path(target).expanduser()
    if _is_run(folder):
        return _of_run(folder.absolute(), overrides, checkpoint, tree or {})
    if checkpoint is not None:
        raise ConfigError(f"--checkpoint={checkpoint} needs the folder of a run, and {target} is none.")
    if (folder / CONFIG_FILE).is_file():
        run = folder.absolute().parent
        if config is None and _is_run(run):
            home, base = run, {**read_tree(run / "config.yaml"), "name": run.name}
        else:
            home, base = _base(config, folder.absolute().name)
            base["model"] = _adapted(folder)
        cfg = _load({**base, **(tree or {})}, overrides, home)
        model = fetched(replace(cfg.model, adapter_path=str(folder.absolute())))
        if not _is_run(run):
            return Target(replace(cfg, model=model), None, None, None, folder.absolute().name)
        step = _last_step(run) if folder.name == "adapter" else None
        return Target(replace(cfg, model=model), run, None, step, f"{run.name}-{folder.absolute().name}")
    if (folder / "config.json").is_file() or is_hub_name(target):
        path = str(folder.absolute()) if folder.is_dir() else target
        home, base = _base(config, Path(path).name)
        cfg = _load({**base, "model": {"path": path}, **(tree or {})}, overrides, home)
        return Target(replace(cfg, model=fetched(_untrained(cfg.model))), None, None, None, Path(path).name)
    raise ConfigError(
        f"{target} is neither a run (config.yaml, metrics.jsonl), an adapter ({CONFIG_FILE}) nor a model (config.json)."
    )


def _of_run(run: Path, overrides: Sequence[str], checkpoint: str | None, tree: Tree) -> Target:
    cfg = _load({**read_tree(run / "config.yaml"), **tree}, overrides, run)
    cfg = replace(cfg, model=fetched(cfg.model))
    full = cfg.model.lora_type == "full"
    if checkpoint == "best":
        return _exported(cfg, run, run / "best", None, f"{run.name}-best")
    if checkpoint is None and (result := run / ("model" if full else "adapter")).is_dir():
        return _exported(cfg, run, result, _last_step(run), run.name)
    checkpoints = Checkpoints(run / "checkpoints", keep=1, is_writer=False)
    if checkpoint is None:
        found = checkpoints.newest()
        if found is None:
            raise ConfigError(f"{run} has neither a result nor a checkpoint.")
    else:
        steps = checkpoints.steps()
        if not (checkpoint.isdigit() and int(checkpoint) in steps):
            there = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"--checkpoint={checkpoint} is not one of {run}, which are {there}.")
        found = checkpoints.folder_of(int(checkpoint))
        if clause := damage_of(found):
            raise ConfigError(f"checkpoint {found} is damaged: {clause}.")
    step = step_of(found)
    return Target(cfg, run, found, step, f"{run.name}-step{step}")


def _exported(cfg: RunConfig, run: Path, folder: Path, step: int | None, label: str) -> Target:
    """A run's policy that it has exported."""
    if not folder.is_dir():
        raise ConfigError(f"{run} has no folder {folder.name}: eval.keep_best=true writes it.")
    if cfg.model.lora_type == "full":
        whole = replace(cfg, model=_untrained(replace(cfg.model, path=str(folder))))
        return Target(whole, run, None, step, label, folder, cfg)
    return Target(replace(cfg, model=replace(cfg.model, adapter_path=str(folder))), run, None, step, label)


def _untrained(model: ModelConfig) -> ModelConfig:
    """For a whole model as it is: a new LoRA, which leaves its outputs unchanged."""
    fresh = {"lora_type": "lora", "lora_rank": 1, "adapter_path": None, "quantize_base": False, "train_vision": "none"}
    return replace(model, lora_targets=["q_proj", "v_proj"], revision=None, **fresh)


def _adapted(folder: Path) -> dict[str, Any]:
    """The `model` section for a PEFT folder, over the base that it names."""
    fields, peft = json.loads((folder / CONFIG_FILE).read_text()), read_peft_config(folder)
    base = fields.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"the adapter in {folder} names no base_model_name_or_path.")
    revision = fields.get("revision")
    return {**_shape(peft), "path": base, **({} if revision is None else {"revision": revision})}


def _shape(peft: PeftConfig) -> dict[str, Any]:
    targets = peft.targets if isinstance(peft.targets, str) else [t for t in peft.targets if not _in_tower(t)]
    tower = {"train_vision": "lora"} if len(targets) < len(peft.targets) else {}
    return {
        **({"train_vision": "full"} if {*peft.modules_to_save} & {*TOWERS} else tower),
        "lora_type": "dora_cache" if peft.use_dora else "lora",
        "lora_rank": peft.r,
        "lora_alpha": peft.lora_alpha,
        "use_rslora": peft.use_rslora,
        "lora_targets": targets,
    }


def _in_tower(target: str) -> bool:
    return target in TOWER_LINEARS or not {*target.split(".")}.isdisjoint(TOWERS)


def _base(config: str | None, name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a config and its tree; without a config, a tree that only lacks the model."""
    if config is not None:
        file = config_file(config)
        return file.parent, {**read_tree(file), "name": name}
    placeholder = {"_component_": "tora.rewards.format"}
    return Path.cwd(), {"name": name, "dataset": {"_component_": "tora.tasks.sums.sums"}, "rewards": [placeholder]}


def _load(tree: Tree, overrides: Sequence[str], home: Path) -> RunConfig:
    """A checked config of a tree, for one process. `home`: see `load_config`."""
    tree = {**tree, **_ALONE, "rollout": {**(tree.get("rollout") or {}), **_ROLLOUT}}
    if tree.get("eval"):
        tree["eval"] = {**tree["eval"], "num_workers": 0}
    with tempfile.TemporaryDirectory(prefix="tora-config-") as scratch:
        file = Path(scratch, "config.yaml")
        file.write_text(yaml.safe_dump(dict(tree)))
        return load_config(str(file), overrides, home=home)


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl"))


def _last_step(run: Path) -> int | None:
    """Completed steps of a run, by its rows."""
    from tora.reporting.metrics import read_rows

    steps = [row["step"] + 1 for row in read_rows(run / "metrics.jsonl") if "version" in row]
    return max(steps, default=None)
