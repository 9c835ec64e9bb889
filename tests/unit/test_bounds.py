"""Bounds of numeric config keys: which key has which, and the message for a value outside them."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any

import pytest

from tora.config.bounds import Above, AtLeast, AtMost, bounds_of, out_of_bounds
from tora.config.load import load_config
from tora.config.rules import check
from tora.errors import ConfigError

AT_LEAST = {
    1: "num_steps batch_size max_prompt_tokens max_generated_tokens ppo_epochs num_mini_batches "
    "step_parts micro_batch_tokens learner_ranks "
    "model.lora_rank rollout.num_workers rollout.tensor_parallel rollout.min_workers rollout.max_workers "
    "rollout.concurrency rollout.max_model_len rollout.max_pixels rollout.partial reward_processes "
    "max_tool_calling_iterations environment_processes "
    "eval.num_prompts eval.every eval.samples eval.early_stop checkpoint.every checkpoint.keep",
    2: "grpo_samples",
    0: "seed num_threads max_staleness top_k eval.temperature rollout.max_refills rollout.oversample sync.canary_every "
    "rollout.max_restarts max_learner_restarts max_failed_rewards max_bad_steps max_idle_steps min_p eval.top_k "
    "eval.min_p model.lora_dropout eval.seed eval.num_workers log_completions",
}
ABOVE_0 = (
    "temperature top_p clip_grad_norm model.lora_alpha rollout.kv_cache_gib rollout.gpu_memory_utilization "
    "sync.canary_max_gap rollout.group_timeout_s rollout.heartbeat_s rollout.start_timeout_s reward_timeout_s "
    "learner_timeout_s repetition_penalty eval.top_p eval.repetition_penalty environment_timeout_s "
    "environment_memory_gib"
)
AT_MOST_1 = "top_p min_p eval.top_p eval.min_p rollout.gpu_memory_utilization max_failed_rewards"
CASES = [(key, bound - 1, f"at least {bound}") for bound, keys in AT_LEAST.items() for key in keys.split()]
CASES += [(key, 0, "greater than 0") for key in ABOVE_0.split()]
CASES += [(key, 1.5, "at most 1") for key in AT_MOST_1.split()]
CASES += [("model.lora_dropout", 1, "less than 1"), ("num_threads", 4097, "at most 4096")]
CASES += [(key, 2**63, f"at most {2**63 - 1}") for key in ("seed", "eval.seed")]


def numbers(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys of all fields with one number, with `int` or `float`."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= numbers(value, f"{prefix}{field.name}.")
        elif "list[" not in str(field.type) and (kind := re.search(r"\b(int|float)\b", str(field.type))):
            found[prefix + field.name] = kind[1]
    return found


NUMBERS = numbers(load_config("quickstart"))


@pytest.mark.parametrize(("key", "value", "words"), CASES)
def test_a_number_outside_its_bounds(key: str, value: float, words: str) -> None:
    shown = float(value) if NUMBERS[key] == "float" else value
    with pytest.raises(ConfigError) as error:
        load_config("quickstart", [f"{key}={value}"])
    assert str(error.value) == f"{key}={shown} must be {words}."


def test_every_number_is_bounded() -> None:
    assert NUMBERS.keys() == {key for key, _, _ in CASES}


@pytest.mark.parametrize("key", [key for key, kind in NUMBERS.items() if kind == "float"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf"])
def test_numbers_are_finite(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.* must be a finite number\.$"):
        load_config("quickstart", [f"{key}={value}"])


def test_a_config_made_in_python_is_checked_too() -> None:
    cfg = load_config("quickstart")
    assert cfg.eval is not None
    broken = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, temperature=math.nan))
    with pytest.raises(ConfigError, match=r"^eval\.temperature=nan must be at least 0\.$"):
        check(broken)
    check(dataclasses.replace(cfg, eval=None))


@dataclasses.dataclass
class Inner:
    share: Annotated[float, Above(0), AtMost(1)] = 1.0


@dataclasses.dataclass
class Outer:
    count: Annotated[int, AtLeast(1)] | None = None
    name: str = ""
    inner: Inner | None = None


def test_bounds_are_read_from_the_annotations() -> None:
    assert bounds_of(Outer) == {"count": (AtLeast(1),), "name": (), "inner": ()}
    assert bounds_of(Inner) == {"share": (Above(0), AtMost(1))}
    assert list(out_of_bounds(Outer())) == []
    assert list(out_of_bounds(Outer(0, "a", Inner(2.0)))) == [
        "count=0 must be at least 1.",
        "inner.share=2.0 must be at most 1.",
    ]
