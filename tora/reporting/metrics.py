"""Log a run's metrics to the console, `metrics.jsonl` and the configured loggers. Only the training loop logs.

A training row has the index of its step, an evaluation row the number of completed steps.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tora.config.schema import RunConfig
from tora.errors import described
from tora.reporting.completions import rollout_rows, write_parquet
from tora.reporting.console import ConsoleLog
from tora.reporting.evaluation import EvalResult
from tora.reporting.loggers import Logger, build_logger
from tora.reporting.strict_json import to_json
from tora.reporting.tables import log_table
from tora.types import Group, Metrics, Prompt, Rollout

_log = logging.getLogger(__name__)


class NoLog:
    """For ranks other than rank 0, which do not write."""

    def step(self, step: int, metrics: Metrics, prompt_ids: Sequence[int]) -> None: ...

    def evaluation(self, step: int, result: EvalResult) -> None: ...

    def sample(self, prompt: Prompt, rollout: Rollout) -> None: ...

    def completions(self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]]) -> None: ...

    def warning(self, sentence: str) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class MetricLog:
    """Implements `tora.run.run.Log`."""

    def __init__(
        self,
        cfg: RunConfig,
        folder: Path,
        first_step: int = 0,
        console: Console | None = None,
        run_id: str = "",
    ) -> None:
        """Writes into `folder`. Rows of `first_step` and later, which a resumed run writes again, are removed.

        Raises ConfigError if a `metric_logger` cannot be built.
        """
        self.path = folder / "metrics.jsonl"
        self._tables = folder / "completions"
        cut(self.path, first_step)
        self._loggers = [build_logger(component, cfg, folder, run_id) for component in cfg.metric_logger]
        self._failed: set[str] = set()
        self._file = self.path.open("a")
        self._console = ConsoleLog(console or Console(), cfg.name, first_step, cfg.num_steps)

    def step(self, step: int, metrics: Metrics, prompt_ids: Sequence[int] = ()) -> None:
        """`prompt_ids`: the prompts trained on; only `metrics.jsonl` gets them."""
        self._write(step, metrics, prompt_ids=list(prompt_ids))
        self._console.step(step, metrics)

    def evaluation(self, step: int, result: EvalResult) -> None:
        self._write(step, eval_metrics(result))
        self._console.evaluation(step, result)

    def sample(self, prompt: Prompt, rollout: Rollout) -> None:
        self._console.sample(prompt, rollout)

    def completions(self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]]) -> None:
        """Writes `completions/step_N.parquet`, N from 1, and shows the first rows in loggers with `log_table`."""
        rows = rollout_rows(groups, advantages)
        try:
            write_parquet(rows, self._tables / f"step_{step + 1}.parquet")
        except OSError as error:
            self.warning(f"no table of completions of step {step + 1}: {error}")
        self._tell(lambda logger: log_table(logger, rows, step))

    def warning(self, sentence: str) -> None:
        _log.warning(sentence)

    def close(self) -> None:
        """Flushes and closes every logger and restores the terminal."""
        self._console.close()
        self._file.close()
        for logger in self._loggers:
            try:
                logger.close()
            except Exception as error:  # each service's client raises errors of its own
                _log.warning("the metric logger %s did not close: %s", type(logger).__name__, described(error))

    def rewind(self, step: int) -> None:
        """Removes rows of `step` and later from `metrics.jsonl`, for a run that returns to a checkpoint."""
        self._file.close()
        cut(self.path, step)
        self._file = self.path.open("a")

    def _write(self, step: int, metrics: Metrics, **extra: Any) -> None:
        self._file.write(to_json({"step": step, **metrics, **extra}) + "\n")
        self._file.flush()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._tell(lambda logger: logger.log_dict(finite, step))

    def _tell(self, say: Callable[[Logger], object]) -> None:
        """A logger that fails, as when its server is away, costs its row and not the run; the first time is said."""
        for logger in self._loggers:
            try:
                say(logger)
            except Exception as error:  # each service's client raises errors of its own
                name = type(logger).__name__
                if name not in self._failed:
                    self._failed.add(name)
                    _log.warning("the metric logger %s failed and lacks rows from now on: %s", name, described(error))


def eval_metrics(result: EvalResult) -> Metrics:
    """`eval/reward` and so on; `eval/NAME/reward` for a set with a name."""
    metrics = {"eval/reward": result.reward, "eval/num_prompts": float(result.num_prompts)}
    if result.accuracy is not None:
        metrics["eval/accuracy"] = result.accuracy
    metrics |= {f"eval/pass@{k}": value for k, value in result.pass_at.items()}
    metrics |= {"eval/length_mean": result.length, "eval/truncated_share": result.truncated}
    return {key.replace("/", f"/{result.name}/", 1) if result.name else key: value for key, value in metrics.items()}


def read_rows(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without a last line that a crash left incomplete; empty if there is no file."""
    rows = []
    for line in metrics_jsonl.read_text().splitlines() if metrics_jsonl.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # rows are flushed one by one, so only the last can be incomplete
    return rows


def cut(metrics_jsonl: Path, first_step: int) -> None:
    """Removes rows of `first_step` and later. Writes a new file and renames it, so that a crash loses no other rows."""
    kept = [row for row in read_rows(metrics_jsonl) if row["step"] < first_step]
    aside = metrics_jsonl.with_suffix(".tmp")
    aside.write_text("".join(to_json(row) + "\n" for row in kept))
    os.replace(aside, metrics_jsonl)
