"""Where a run's numbers go: the console, `metrics.jsonl` and the configured loggers. Dicts in; only the loop logs.

A training row carries the index of its step, an evaluation row the number of completed steps.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tora.components import instantiate, locate
from tora.config import Component, RunConfig
from tora.types import EvalResult, Metrics, Prompt, Rollout

_SHOWN = (
    ("reward/mean", "reward {:.3f}"),
    ("loss/total", "loss {:.4f}"),
    ("staleness/max", "staleness {:.0f}"),
    ("rollout/tokens_per_s", "{:,.0f} tok/s"),
    ("version", "version {:.0f}"),
)
_LONGEST_SAMPLE = 1200
"""Characters of a prompt or completion shown on the console."""


class Logger(Protocol):
    """What torchtune's metric loggers are."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class NoLog:
    """For a rank that is not the one that writes."""

    def step(self, step: int, metrics: Metrics, prompt_ids: Sequence[int]) -> None: ...

    def evaluation(self, step: int, result: EvalResult) -> None: ...

    def sample(self, prompt: Prompt, rollout: Rollout) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class MetricLog:
    """Implements `tora.loop.Log`."""

    def __init__(self, cfg: RunConfig, folder: Path, first_step: int = 0, console: Console | None = None) -> None:
        """Writes into `folder`; a resumed run's `first_step` cuts the rows that it will write again.

        Raises `ConfigError` for a `metric_logger` that cannot be built.
        """
        self.path = folder / "metrics.jsonl"
        self._loggers = [build_logger(component, folder) for component in cfg.metric_logger]
        cut(self.path, first_step)
        self._file = self.path.open("a")
        self._console = _ConsoleLog(console or Console(), cfg.name, first_step, cfg.num_steps)

    def step(self, step: int, metrics: Metrics, prompt_ids: Sequence[int] = ()) -> None:
        """`prompt_ids`: what the step trained; in `metrics.jsonl` alone."""
        self._write(step, metrics, prompt_ids=list(prompt_ids))
        self._console.step(step, metrics)

    def evaluation(self, step: int, result: EvalResult) -> None:
        metrics = {
            "eval/accuracy": result.accuracy,
            "eval/reward": result.reward,
            "eval/num_prompts": float(result.num_prompts),
        }
        self._write(step, metrics)
        self._console.evaluation(step, result)

    def sample(self, prompt: Prompt, rollout: Rollout) -> None:
        self._console.sample(prompt, rollout)

    def close(self) -> None:
        """Flushes and closes every logger and gives the terminal back."""
        self._console.close()
        self._file.close()
        for logger in self._loggers:
            logger.close()

    def rewind(self, step: int) -> None:
        """The run goes back: rows of `step` and later are cut from `metrics.jsonl`."""
        self._file.close()
        cut(self.path, step)
        self._file = self.path.open("a")

    def _write(self, step: int, metrics: Metrics, **extra: Any) -> None:
        # JSON has no NaN; null keeps the row readable by every parser.
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}, **extra}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.log_dict(metrics, step)


def build_logger(component: Component, folder: Path) -> Logger:
    """The component's logger; one that takes a `log_dir` gets the run's folder unless it names its own."""
    parameters = inspect.signature(locate(component["_component_"])).parameters
    if "log_dir" in parameters and not {"log_dir", "dir"} & component.keys():
        component = {**component, "log_dir": str(folder)}
    return instantiate(component)


def read_rows(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, up to a last line that a crash left half written; none without the file."""
    rows = []
    for line in metrics_jsonl.read_text().splitlines() if metrics_jsonl.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the end of the file can be torn: rows are flushed one by one
    return rows


def cut(metrics_jsonl: Path, first_step: int) -> None:
    """Removes rows of `first_step` and later; written aside and renamed, so that a crash loses none of the others."""
    kept = [row for row in read_rows(metrics_jsonl) if row["step"] < first_step]
    aside = metrics_jsonl.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(aside, metrics_jsonl)


class _ConsoleLog:
    """A progress bar with messages above it on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, name: str, first_step: int, num_steps: int) -> None:
        self._console = console
        self._first_step, self._num_steps = first_step, num_steps
        self._start = time.perf_counter()
        self._progress = _progress(console) if console.is_terminal else None
        self._task = TaskID(0)
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=num_steps, completed=first_step, numbers="")
            self._progress.start()

    def step(self, step: int, metrics: Metrics) -> None:
        numbers = [shape.format(metrics[key]) for key, shape in _SHOWN if key in metrics]
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1, numbers=" · ".join(numbers))
            return
        per_step = (time.perf_counter() - self._start) / (step + 1 - self._first_step)
        left = duration(per_step * (self._num_steps - step - 1))
        self._print(Text("  ".join([f"step {step + 1}/{self._num_steps}", *numbers, f"{left} left"])))

    def evaluation(self, step: int, result: EvalResult) -> None:
        accuracy = f"held-out accuracy {result.accuracy:.3f}"
        self._print(Text(f"after {step} steps: {accuracy} over {result.num_prompts} prompts", style="bold green"))

    def sample(self, prompt: Prompt, rollout: Rollout) -> None:
        self._print(_quoted(_question(prompt), "dim"))
        self._print(_quoted(rollout.text, "cyan"))
        self._print(Text(f"  reward {rollout.reward:g}"))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _print(self, text: Text) -> None:
        # soft_wrap: a line of a log file stays one line
        self._console.print(text, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        console=console,
    )


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _question(prompt: Prompt) -> str:
    """The last message's text."""
    content = prompt.source if isinstance(prompt.source, str) else prompt.source[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", f"<{part['type']}>") for part in content)


def _quoted(text: str, style: str) -> Text:
    shown = text if len(text) <= _LONGEST_SAMPLE else text[:_LONGEST_SAMPLE] + " ..."
    return Text("\n".join(f"  │ {line}" for line in shown.splitlines() or [""]), style=style)
