"""Functions and classes of a program, as the dotted paths by which a config names them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tora.config.components import register
from tora.errors import ConfigError
from tora.tasks.dataset import empty_rows
from tora.tasks.tokenizer import load_tokenizer

GET_REWARD = "tora.environments.get_reward"
Environments = Callable[..., Any] | Mapping[str, Callable[..., Any]]


def rewards(functions: Any, weights: Sequence[float] | None, environments: Environments | None) -> list[dict[str, Any]]:
    """The section `rewards`. As in TRL, an environment that has `get_reward` is one more reward, of weight 1."""
    listed = list(functions) if isinstance(functions, list | tuple) else [] if functions is None else [functions]
    if weights is not None and len(weights) != len(listed):
        raise ConfigError(f"reward_weights has {len(weights)} weights for {len(listed)} reward_funcs")
    found: list[dict[str, Any]] = []
    for number, function in enumerate(listed):
        path, name = path_of(function, "reward_funcs"), _name_of(function)
        name = f"{name}_{number}" if any(each["name"] == name for each in found) else name
        weight = {} if weights is None else {"weight": float(weights[number])}
        found.append({"_component_": path, "name": name, **weight})
    if any(callable(getattr(made, "get_reward", None)) for made in _factories(environments)):
        found.append({"_component_": GET_REWARD, "name": "get_reward"})
    if not found:
        raise ConfigError("GRPOTrainer needs reward_funcs, or an environment_factory whose class has get_reward")
    return found


def environment_factory(environments: Environments | None) -> dict[str, Any] | None:
    """The config's key of that name. Raises ConfigError if it is neither callable nor callables by name."""
    if environments is None:
        return None
    if isinstance(environments, Mapping):
        return {name: {"_component_": path_of(made, "environment_factory")} for name, made in environments.items()}
    return {"_component_": path_of(environments, "environment_factory")}


def placeholder_rows(environments: Environments | None, max_steps: int) -> list[dict[str, Any]]:
    """What stands for a dataset that is not given, as in TRL. Raises ConfigError where one is needed."""
    if environments is None:
        raise ConfigError("GRPOTrainer needs a train_dataset, or an environment_factory whose reset gives the prompts")
    if isinstance(environments, Mapping):
        raise ConfigError("several environments need a train_dataset, whose column environment names that of each row")
    if max_steps <= 0:
        raise ConfigError("GRPOTrainer without a train_dataset needs GRPOConfig(max_steps=...), which ends the run")
    return empty_rows()


def _factories(environments: Environments | None) -> Sequence[Any]:
    if environments is None:
        return []
    return [*environments.values()] if isinstance(environments, Mapping) else [environments]


def _name_of(function: Any) -> str:
    name = function.rpartition(".")[2] if isinstance(function, str) else getattr(function, "__name__", "")
    if name.isidentifier():
        return name
    return "reward" if name else type(function).__name__  # a lambda, or an object that is called


def path_of(function: Any, argument: str) -> str:
    """A dotted path. What a module has under its own name is found there by other processes too. `argument` names in
    messages where it was given."""
    if isinstance(function, str):
        return function
    if not callable(function):
        raise ConfigError(f"{argument} holds a {type(function).__name__}, expected a function or its dotted path")
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    loaded = sys.modules.get(module or "")
    if module != "__main__" and name.isidentifier() and getattr(loaded, name, None) is function:
        return f"{module}.{name}"
    return register(_name_of(function), function)


def check_processing_class(processing_class: Any, model: Any, chat_template: str | None) -> None:
    """Raises ConfigError if a tokenizer or processor is not the model's own, which is what a run reads.

    `chat_template`: the file that takes the place of the model's own template, if there is one.
    """
    if processing_class is None:
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    name = getattr(tokenizer, "name_or_path", None) or str(model)
    if Path(name).expanduser().absolute() != Path(model).expanduser().absolute():
        raise ConfigError(
            f"processing_class is the tokenizer of {name}, and a run reads the model's own, of {model}; save it into "
            "the model's folder"
        )
    given = getattr(processing_class, "chat_template", None)
    if chat_template is None and Path(model).is_dir() and given != load_tokenizer(Path(model)).chat_template:
        raise ConfigError(
            f"processing_class has another chat template than {model}; write it to a file and name that in "
            "GRPOConfig(tora={'chat_template': FILE})"
        )
