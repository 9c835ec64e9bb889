"""PEFT's adapter_config.json: what of it Tora computes, and a refusal by name of everything else.

Every field of PEFT 0.21's `LoraConfig` is in exactly one of the tables below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tora.config.schema import ALL_LINEAR
from tora.errors import ConfigError

CONFIG_FILE = "adapter_config.json"

READ = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights", "bias",
    }
)  # fmt: skip
NO_EFFECT = frozenset(
    {
        # where the adapter comes from, and how PEFT is to use it
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "runtime_config", "megatron_core",
        # training: `model.lora_dropout` is this run's
        "lora_dropout",
        # PEFT resets it for linear layers
        "fan_in_fan_out",
        # belong to an initialisation or a method that is refused where it changes anything
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
        # concerns adapters on embeddings and heads alone
        "ensure_weight_tying",
    }
)  # fmt: skip
"""Fields that do not change what a trained adapter on linear layers computes."""
REFUSED = {
    "lora_bias": "a bias on B",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters on parameters that are no linear layers",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Fields that must be empty, and what they stand for."""
PLAIN_INITS = ("gaussian", "orthogonal", "eva")
"""Initialisations, besides true and false, that leave the base's weights alone."""
CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations that change the base, from which PEFT converts back to plain LoRA."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What a PEFT folder says about its adapter."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    targets: str | Sequence[str]
    excluded: str | Sequence[str]
    layers: Sequence[int]
    """Indices of the only layers that are adapted; empty: all."""
    layers_pattern: Sequence[str]
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    modules_to_save: Sequence[str]

    @property
    def max_rank(self) -> int:
        return max([self.r, *map(int, self.rank_pattern.values())])

    def adapts(self, name: str) -> bool:
        """Whether PEFT puts this adapter on the linear layer of this Hugging Face name."""
        if self.excluded and matches(self.excluded, name):
            return False
        if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in self.modules_to_save):
            return False
        if not matches(self.targets, name):
            return False
        return not self.layers or _layer(name, self.layers_pattern) in self.layers


def matches(targets: str | Sequence[str], name: str) -> bool:
    """PEFT's rule for a linear layer: a string is `all-linear` or a regular expression for the whole name, a list has
    names or their last parts."""
    if isinstance(targets, str):
        return targets == ALL_LINEAR or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def by_pattern(pattern: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule: the value of the first key that, as a regular expression, matches the last parts of the name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _layer(name: str, patterns: Sequence[str]) -> int | None:
    """The index of the layer that a module belongs to."""
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns or [r"[^.]*"]]
    return next((int(match[1]) for match in found if match), None)


def read_peft_config(folder: Path) -> PeftConfig:
    """Raises ConfigError if the folder holds no adapter, or one that Tora would not compute as PEFT does."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"model.adapter_path {str(folder)!r} holds no {CONFIG_FILE}")
    try:
        fields = json.loads(file.read_text())
        if not isinstance(fields, dict):
            raise TypeError(f"it holds a {type(fields).__name__}")
        _check(fields)
        return PeftConfig(
            r=int(fields["r"]),
            lora_alpha=float(fields["lora_alpha"]),
            use_rslora=bool(fields.get("use_rslora")),
            use_dora=bool(fields.get("use_dora")),
            targets=fields["target_modules"],
            excluded=fields.get("exclude_modules") or (),
            layers=_as_list(fields.get("layers_to_transform")),
            layers_pattern=_as_list(fields.get("layers_pattern")),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            modules_to_save=_as_list(fields.get("modules_to_save")),
        )
    except _Refusal as refusal:
        raise ConfigError(f"the adapter in {str(folder)!r} has {refusal}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{str(file)!r} is no adapter config of PEFT: {type(error).__name__} {error}") from None


class _Refusal(Exception):
    """The rest of a sentence that begins with 'the adapter in FOLDER has'."""


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _check(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in REFUSED and value:
            raise _Refusal(f"{name}={_short(value)}: {REFUSED[name]}, which Tora does not support; {_MERGE}")
        if name not in READ | NO_EFFECT | REFUSED.keys() and value:
            raise _Refusal(f"{name}={_short(value)}, which Tora does not know and so may not compute; {_MERGE}")
    if fields.get("peft_type") != "LORA":
        raise _Refusal(f"peft_type={_short(fields.get('peft_type'))}, and only LORA is supported; {_MERGE}")
    if fields.get("bias", "none") != "none":
        raise _Refusal(f"bias={_short(fields['bias'])}: trained biases, which Tora does not support; {_MERGE}")
    if not fields.get("target_modules"):
        raise _Refusal("no target_modules")
    if isinstance(fields["target_modules"], str) and (
        fields.get("layers_to_transform") or fields.get("layers_pattern")
    ):
        raise _Refusal("layers_to_transform beside a target_modules that is no list, which PEFT refuses")
    _check_init(fields.get("init_lora_weights", True))


_MERGE = "PEFT's merge_and_unload makes a model.path of base and adapter."


def _check_init(init: Any) -> None:
    if isinstance(init, bool) or init is None or init in PLAIN_INITS:
        return
    if str(init).startswith(CONVERTIBLE_INITS):
        raise _Refusal(
            f"init_lora_weights={init}, which changes the base's weights too; PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion writes it as plain LoRA."
        )
    raise _Refusal(f"init_lora_weights={_short(init)}, which is no plain LoRA; {_MERGE}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
