"""The README.md of an exported policy: what it is, how it was trained, what it scored, and how to load it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tora.config.schema import Component, RunConfig
from tora.models.hub import named
from tora.reporting.metrics import read_rows

_CURVE = "reward_curve.png"
Kind = str
"""`adapter`, `merged` or `model`."""


def write_model_card(
    folder: Path,
    kind: Kind,
    cfg: RunConfig,
    *,
    run: Path | None,
    step: int | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write README.md, and beside it the run's reward curve if it has one. `run`: the run's folder; None if it is not
    known. `step`: that of the policy, later ones are left out; None for the last. `notes`: sentences about this export.
    Holds no path of this machine."""
    curve = None if run is None else run / _CURVE
    if curve is not None and curve.is_file():
        shutil.copy(curve, folder / _CURVE)
    rows = [] if run is None else read_rows(run / "metrics.jsonl")
    rows = [row for row in rows if step is None or row["step"] + ("version" in row) <= step]
    has_curve = (folder / _CURVE).is_file()
    (folder / "README.md").write_text(model_card(kind, cfg, rows, notes, has_curve=has_curve))


def model_card(
    kind: Kind, cfg: RunConfig, rows: Sequence[dict[str, Any]], notes: Sequence[str] = (), *, has_curve: bool = False
) -> str:
    """The text. `rows`: those of the run's `metrics.jsonl`."""
    base = base_name(cfg)
    front = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        **({"base_model": base} if "/" in base else {}),
        "pipeline_tag": "text-generation",
        "tags": ["tora", "grpo", "reinforcement-learning", *([cfg.model.lora_type] if kind == "adapter" else [])],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {cfg.name}",
        f"{_WHAT[kind]} of `{base}`, trained by reinforcement learning (GRPO) with Tora.",
        *notes,
        *(["## Reward", f"![Reward over the steps of the run]({_CURVE})"] if has_curve else []),
        *_results(rows),
        "## Settings",
        _table([("setting", "value"), *_settings(cfg, rows)]),
        "## Use",
        f"```python\n{_USE[kind].format(base=base)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


_WHAT = {"adapter": "An adapter", "merged": "A fine-tuned version", "model": "A fine-tuned version"}
_USE = {
    "adapter": "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
    'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "THIS_FOLDER")',
    "merged": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
    'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
}
_USE["model"] = _USE["merged"]


def base_name(cfg: RunConfig) -> str:
    """The base's name on the hub, or the name of its folder."""
    path = named(cfg.model).path
    return Path(path).name if Path(path).is_absolute() else path


def _results(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = [(row["step"], row) for row in rows if row.get("eval/reward") is not None]
    if not found:
        return []
    chosen = found if len(found) <= 2 else [found[0], found[-1]]
    keys = [key for key in chosen[-1][1] if key.startswith("eval/") and key != "eval/num_prompts"]
    head = ("held-out", *(f"step {step}" for step, _ in chosen))
    body = [(key.removeprefix("eval/"), *(_number(row.get(key)) for _, row in chosen)) for key in keys]
    return ["## Results", f"On {chosen[-1][1]['eval/num_prompts']:.0f} held-out prompts.", _table([head, *body])]


def _settings(cfg: RunConfig, rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    steps = max((row["step"] + 1 for row in rows if "version" in row), default=None)
    model = cfg.model
    adapter = f"{model.lora_type}, rank {model.lora_rank}, alpha {model.lora_alpha:g}"
    adapter += ", NF4 base" if model.quantize_base else ""
    return [
        ("base", base_name(cfg)),
        *([("revision", model.revision)] if model.revision else []),
        (
            "trained",
            "all weights" if model.lora_type == "full" else adapter,
        ),
        ("loss", _short(cfg.loss)),
        ("dataset", _short(cfg.dataset)),
        ("rewards", ", ".join(_short(reward) for reward in cfg.rewards)),
        ("steps", str(cfg.num_steps if steps is None else steps)),
        ("batch", f"{cfg.batch_size} prompts x {cfg.grpo_samples} rollouts"),
        ("learning rate", f"{cfg.optimizer['lr']:g}, {_short(cfg.optimizer)}"),
        ("tokens", f"{cfg.max_prompt_tokens} prompt, {cfg.max_generated_tokens} completion"),
        ("temperature", f"{cfg.temperature:g}"),
        ("dtype", cfg.dtype),
        ("seed", str(cfg.seed)),
    ]


def _short(component: Component) -> str:
    """Such as `GRPOLoss` or `file_dataset`: the callable's name, without arguments, which may be paths."""
    return str(component.get("name") or component.get("_component_", "")).rpartition(".")[2]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
