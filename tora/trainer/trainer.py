"""`GRPOTrainer`: a run from Python, by the code that `tora run` uses, with functions and datasets as objects."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tora.config.components import register
from tora.config.load import load_config
from tora.config.schema import RunConfig
from tora.errors import ConfigError
from tora.trainer import objects
from tora.trainer.arguments import GRPOConfig, model_tree
from tora.trainer.objects import Environments, path_of, rewards


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves."""

    output_dir: Path
    finished: bool
    """False if a signal ended it before its last step."""
    history: list[dict[str, Any]]
    """The rows of `metrics.jsonl`, of steps and of evaluations."""

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return {name: value for row in self.history for name, value in row.items() if isinstance(value, int | float)}

    @property
    def training_loss(self) -> float | None:
        """Of the last step, as TRL's `TrainOutput` has it."""
        return self.metrics.get("loss/total")

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter, or of the whole model if all weights were trained."""
        adapter = self.output_dir / "adapter"
        return adapter if adapter.is_dir() else self.output_dir / "model"

    def generate(self, prompts: Sequence[str | list[dict[str, Any]]] | str, **sampling: Any) -> list[str]:
        """The trained policy's answers. `sampling`: `max_tokens`, `temperature` (default 0), `top_p` and so on."""
        from tora.launch.policies import generate
        from tora.run.target import find

        return generate(find(str(self.output_dir)), [prompts] if isinstance(prompts, str) else prompts, **sampling)


class GRPOTrainer:
    """TRL's arguments, where the meaning is the same.

    `reward_funcs`: functions, dotted paths, or a list of them. Functions that another module can import run in
    processes of their own, with time limits; those of a script or a notebook run in this process. May be None if the
    environment has `get_reward`. Datasets: anything with `len` and `[i]` whose rows have a `prompt`, which an
    environment may give instead; a single environment needs no `train_dataset` if `max_steps` is set. `tools`:
    functions that the model may call. `environment_factory`: a class or callable, or several by the names in the
    dataset's column `environment`; those of a script are sent to the processes of environments. See `docs/agents.md`.
    `processing_class`: the model's own tokenizer or processor, which is read from its folder anyway.
    """

    def __init__(
        self,
        model: str | Path,
        reward_funcs: Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        tools: Sequence[Callable[..., Any] | str] | None = None,
        environment_factory: Environments | None = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        """Checks everything that needs no weights. Raises ConfigError for what cannot be trained."""
        for name, value in others.items():
            if value is not None:
                raise ConfigError(f"GRPOTrainer has no argument {name}")
        self.args = args or GRPOConfig()
        self._needs_prompts = environment_factory is None
        if train_dataset is None:
            train_dataset = objects.placeholder_rows(environment_factory, self.args.max_steps)
        objects.check_processing_class(processing_class, model, (self.args.tora or {}).get("chat_template"))
        rows = self._rows(train_dataset, "train_dataset")
        tree = {
            **self.args.tree(len(rows)),
            "model": model_tree(model, peft_config),
            "dataset": {"_component_": register("train_dataset", lambda: rows)},
            "rewards": rewards(reward_funcs, self.args.reward_weights, environment_factory),
            "tools": [path_of(tool, "tools") for tool in tools or ()],
            "environment_factory": objects.environment_factory(environment_factory),
            "eval": self._evaluation(eval_dataset),
        }
        overrides = [f"{key}={_plain(value)}" for key, value in (self.args.tora or {}).items()]
        self.cfg: RunConfig = _load(tree, overrides)
        self.result: TrainResult | None = None

    def _evaluation(self, dataset: Any) -> dict[str, Any] | None:
        if dataset is None or self.args.eval_strategy == "no":
            return None
        sets = dataset if isinstance(dataset, dict) else {"": dataset}
        components = []
        for name, each in sets.items():
            rows = self._rows(each, "eval_dataset")
            components.append((name, {"_component_": register(f"eval_dataset{name}", lambda rows=rows: rows)}))
        return {
            "dataset": components[0][1],
            "more": dict(components[1:]),
            "num_prompts": max(1, *(len(self._rows(each, "eval_dataset")) for each in sets.values()), 1),
            "every": self.args.eval_steps or self.args.logging_steps,
            "at_start": bool(self.args.eval_on_start),
        }

    def _rows(self, dataset: Any, name: str) -> Any:
        """Rows with a `prompt`, unless environments give it. Images of a `datasets` table stay encoded."""
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, str | Mapping):
            raise ConfigError(f"{name} is a {type(dataset).__name__}, expected rows: anything with len and [i]")
        if hasattr(dataset, "column_names") and hasattr(dataset, "features"):
            from tora.tasks.dataset import Rows
            from tora.tasks.table import Table

            is_given = self._needs_prompts or "prompt" in dataset.column_names
            return Rows(Table(dataset), name, "prompt" if is_given else None, answer_key=None)
        if len(dataset) == 0:
            raise ConfigError(f"{name} has no rows")
        return dataset

    def train(self, resume_from_checkpoint: bool = False) -> TrainResult:
        """Train, and return what the run leaves. Raises a ToraError in a sentence for what ends the run."""
        from tora.launch.launcher import run
        from tora.launch.ray_cluster import output_folder
        from tora.reporting.metrics import read_rows

        finished = run(replace(self.cfg, resume_from_checkpoint=bool(resume_from_checkpoint)))
        folder = output_folder(self.cfg.output_dir)
        self.result = TrainResult(folder, finished, read_rows(folder / "metrics.jsonl"))
        return self.result

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Copy the trained adapter, with a model card, to the new folder `output_dir`; the run has it already."""
        from tora.commands.export import export_to
        from tora.run.target import find

        if self.result is None:
            raise ConfigError("there is nothing to save before train()")
        if output_dir is not None:
            kind = self.result.adapter.name
            export_to(find(str(self.result.output_dir)), Path(output_dir).absolute(), kind)


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("\n...").strip()


def _load(tree: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    with tempfile.TemporaryDirectory(prefix="tora-config-") as scratch:
        file = Path(scratch, "config.yaml")
        file.write_text(yaml.safe_dump(dict(tree)))
        return load_config(str(file), overrides)
