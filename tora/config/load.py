"""Load a `RunConfig` from YAML files and `key=value` overrides. Imports without torch.

A file may have `extends:` with one file name or a list of them, looked up beside the file and then in `configs/`. They
are merged key by key: later files override earlier ones, the file itself overrides what it extends, and `key=value`
overrides everything. Every mistake in the user's input is a `ConfigError` with one sentence.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tora.config.components import check_component, check_path, check_reward
from tora.config.convert import build, defaults, join, show
from tora.config.environments import by_name, key_of
from tora.config.rules import check
from tora.config.schema import Component, RunConfig
from tora.config.secrets import redacted
from tora.errors import ConfigError, nearest

RUN_ID = "run_id"
"""A line of the `config.yaml` that a run writes: the run's identity, which is no setting and is passed over here."""
_BASES = "base"
"""Folder in `configs/` with files for others to extend; they are not complete configs."""


def configs_dir() -> Path:
    """`configs/`: inside the package if it was installed from a wheel, otherwise at the repository's root."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Names of the shipped configs, as `load_config` takes them, sorted."""
    files = (path.relative_to(configs_dir()) for path in configs_dir().rglob("*.yaml"))
    return sorted(file.as_posix().removesuffix(".yaml") for file in files if file.parts[0] != _BASES)


def config_file(name_or_path: str) -> Path:
    """The file for a path to a YAML file or a name in `configs/`. Raises ConfigError if there is none."""
    path = Path(name_or_path).expanduser()
    is_path = path.suffix in (".yaml", ".yml")
    for candidate in (path, configs_dir() / path) if is_path else (configs_dir() / f"{path}.yaml",):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"There is no config {name_or_path}{nearest(name_or_path, config_names())}.")


def load_config(name_or_path: str, overrides: Sequence[str] = (), *, home: Path | None = None) -> RunConfig:
    """Read, merge, interpolate and check a config. `home`: the folder in which files and modules that it names are also
    looked for; None for its own. Raises ConfigError if it has a mistake."""
    file = config_file(name_or_path)
    tree = _merge(_read(file, ()), _parse_overrides(overrides), "")
    for field in dataclasses.fields(RunConfig):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in tree and not has_default:
            raise ConfigError(f"Missing key {field.name}.")
    try:
        tree = OmegaConf.create(_merge(defaults(RunConfig), tree, ""))
        tree = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or name_or_path}: {_reason(error)}.") from error
    cfg = build(RunConfig, tree, "")
    home = (home or file.parent).resolve()
    cfg.model.path = _find_folder(cfg.model.path, home)
    if cfg.model.adapter_path is not None:
        cfg.model.adapter_path = _find_folder(cfg.model.adapter_path, home)
    if cfg.import_from is None:
        cfg.import_from = [] if home.is_relative_to(configs_dir().resolve()) else [str(home)]
    if cfg.chat_template is not None and not Path(cfg.chat_template).expanduser().exists():
        cfg.chat_template = str(home / cfg.chat_template)
    evaluated = [cfg.eval.dataset, *cfg.eval.more.values()] if cfg.eval is not None else []
    for dataset in (cfg.dataset, *evaluated):
        _look_beside(home, dataset)
    check(cfg)
    for key, component in _components(cfg):
        check_component(component, key)
    for i, reward in enumerate(cfg.rewards):
        check_reward(reward, f"rewards.{i}")
    for i, tool in enumerate(cfg.tools):
        check_path(tool, f"tools.{i}")
    if cfg.agent is not None:
        check_path(cfg.agent, "agent")
    return cfg


def _look_beside(home: Path, dataset: Any) -> None:
    """Have a dataset, or those that a mixture mixes, read a file or a pattern that is in the config's folder `home` and
    not in the working directory."""
    if not isinstance(dataset, dict):
        return
    path = dataset.get("path")
    if isinstance(path, str) and not _is_there(path) and _is_there(str(home / path)):
        dataset["path"] = str(home / path)
    for part in dataset["datasets"] if isinstance(dataset.get("datasets"), list) else ():
        _look_beside(home, part)


def _is_there(path: str) -> bool:
    return Path(path).expanduser().exists() or bool(glob(path, recursive=True))


def _components(cfg: RunConfig) -> Iterator[tuple[str, Component]]:
    """Every component except the rewards, with its dotted key."""
    for name in ("loss", "optimizer", "lr_scheduler"):
        yield name, getattr(cfg, name)
    yield from _datasets(cfg.dataset, "dataset")
    if cfg.eval is not None:
        yield from _datasets(cfg.eval.dataset, "eval.dataset")
        for name, dataset in cfg.eval.more.items():
            if not isinstance(dataset, dict):
                raise ConfigError(f"eval.more.{name}={show(dataset)} must hold _component_ and its arguments.")
            yield from _datasets(dataset, f"eval.more.{name}")
    for name, component in by_name(cfg.environment_factory).items():
        yield key_of(name), component
    for i, logger in enumerate(cfg.metric_logger):
        yield f"metric_logger.{i}", logger


def _datasets(component: Component, key: str) -> Iterator[tuple[str, Component]]:
    """The component, and those that a mixture mixes, without their weights."""
    yield key, component
    mixed: Any = component.get("datasets")
    parts: list[Any] = mixed if isinstance(mixed, list) else []
    for i, part in enumerate(parts):
        if isinstance(part, dict):
            own = {name: value for name, value in part.items() if name != "weight"}
            yield from _datasets(own, f"{key}.datasets.{i}")


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(path: str) -> bool:
    """Whether a `model.path` that is no folder can be the name of a model on the hub."""
    return _HUB_NAME.fullmatch(path) is not None and not Path(path).exists()


def missing_folders(cfg: RunConfig) -> list[str]:
    """A clause for each folder that the config names and that does not exist. The name of a hub model is no folder."""
    paths = {"model.path": cfg.model.path, "model.adapter_path": cfg.model.adapter_path}
    if is_hub_name(cfg.model.path):
        del paths["model.path"]
    return [f"{key}={show(path)} is not a folder" for key, path in paths.items() if path and not Path(path).is_dir()]


def read_tree(path: Path) -> dict[str, Any]:
    """A config file as it stands, merged over the files that it extends but not checked. Raises ConfigError."""
    return _read(path, ())


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(cfg)


def dump_yaml(cfg: RunConfig) -> str:
    """The whole config as YAML, without secrets; but for these `load_config` reads an equal config back from it."""
    return OmegaConf.to_yaml(OmegaConf.create(redacted(to_dict(cfg))))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """One file merged over the files that it extends. `seen`: the files that led to this one."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path} extends itself through {seen[-1]}.")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must contain keys and values.")
    tree.pop(RUN_ID, None)
    extends = tree.pop("extends", [])
    merged: dict[str, Any] = {}
    for name in extends if isinstance(extends, list) else [extends]:
        merged = _merge(merged, _read(_find_base(str(name), path), (*seen, path)), "")
    return _merge(merged, tree, "")


def _find_base(name: str, path: Path) -> Path:
    for folder in (path.parent, configs_dir()):
        for file in (folder / name, folder / f"{name}.yaml"):
            if file.is_file():
                return file
    bases = (base.relative_to(configs_dir()).as_posix() for base in (configs_dir() / _BASES).glob("*.yaml"))
    raise ConfigError(f"{path}: extends={show(name)} is not a file{nearest(name, bases)}.")


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """All overrides as one tree, so that a new `_component_` keeps its arguments whatever their order."""
    tree = OmegaConf.create()
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"The override {override} is not of the form key=value.")
        try:
            tree.merge_with_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"The override {override} cannot be read: {_reason(error)}.") from error
    return dict(OmegaConf.to_container(tree))  # type: ignore[arg-type]


def _merge(base: Any, over: Any, key: str) -> Any:
    """`over` merged onto `base`. A different `_component_` replaces the whole component, with its arguments."""
    if isinstance(base, list) and isinstance(over, dict):
        return _merge_items(base, over, key)
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "_component_" in base and over.get("_component_", base["_component_"]) != base["_component_"]:
        return over
    merged = dict(base)
    for name, value in over.items():
        merged[name] = _merge(base[name], value, join(key, name)) if name in base else value
    return merged


def _merge_items(base: list[Any], over: dict[Any, Any], key: str) -> list[Any]:
    """Overrides of single list items by position, such as `rewards.0.weight=2`."""
    merged = list(base)
    for name, value in over.items():
        if not (str(name).isdigit() and int(name) < len(base)):
            near = nearest(join(key, name), [join(key, i) for i in range(len(base))])
            raise ConfigError(f"Unknown key {join(key, name)}={show(value)}{near}.")
        merged[int(name)] = _merge(base[int(name)], value, join(key, name))
    return merged


def _reason(error: BaseException) -> str:
    """A library's error message as a clause."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return f"{line}{error.problem}"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return first.rpartition("raised while resolving interpolation: ")[2].strip('".')


def _find_folder(path: str, home: Path) -> str:
    """The path as a folder in the working directory, in the config's folder `home` or in `configs/`; unchanged if there
    is none."""
    for root in (Path.cwd(), home, configs_dir()):
        folder = root / Path(path).expanduser()
        if folder.is_dir():
            return str(folder)
    return path
