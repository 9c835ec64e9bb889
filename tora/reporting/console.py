"""A run's console output: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tora.reporting.evaluation import EvalResult
from tora.types import Metrics, Prompt, Rollout

_SHOWN = (
    ("reward/mean", "reward {:.3f}"),
    ("rollout/length_mean", "length {:.0f}"),
    ("rollout/truncated_share", "cut off {:.0%}"),
    ("policy_kl", "kl {:.1e}"),
    ("learner/lr", "lr {:.1e}"),
    ("rollout/tokens_per_s", "{:,.0f} tok/s"),
)
"""Metrics shown for each step, with their formats, the most important first."""
_STALENESS = ("staleness/max", "staleness {:.0f}")
"""Shown once it is above 0: in a synchronous run it never is."""
_WIDEST = 120
"""Columns of the panel on a wider terminal."""
_LONGEST_SAMPLE = 1200
"""Characters of a prompt or completion that are shown."""


class ConsoleLog:
    """On a terminal a progress bar with messages above it, elsewhere a line per message."""

    def __init__(self, console: Console, name: str, first_step: int, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._step_seconds: list[float] = []
        self._progress = _progress(console) if console.is_terminal else None
        self._task, self._numbers = TaskID(0), Text("waiting for the first rollouts", style="dim", no_wrap=True)
        if self._progress is not None:
            self._task = self._progress.add_task("step", total=num_steps, completed=first_step)
            panel = Panel(Group(self._progress, self._numbers), title=name, title_align="left", width=_width(console))
            self._live = Live(panel, console=console, refresh_per_second=2)
            self._live.start()

    def step(self, step: int, metrics: Metrics) -> None:
        shown = [*_SHOWN, _STALENESS] if metrics.get("staleness/max") else _SHOWN
        numbers = [shape.format(metrics[key]) for key, shape in shown if key in metrics]
        if self._progress is not None:
            self._numbers.plain = self._fitting(numbers)
            self._progress.update(self._task, completed=step + 1)
            self._live.refresh()
            return
        self._step_seconds.append(metrics.get("time/step_s", 0.0))
        # the median: a first step with warm-up or compilation is far slower than the rest
        left = duration(median(self._step_seconds) * (self._num_steps - step - 1))
        self._print(Text("  ".join([f"step {step + 1}/{self._num_steps}", *numbers, f"{left} left"])))

    def evaluation(self, step: int, result: EvalResult) -> None:
        scores = [f"held-out reward {result.reward:.3f}"]
        if result.accuracy is not None and result.accuracy != result.reward:
            scores.append(f"accuracy {result.accuracy:.3f}")
        scores += [f"pass@{k} {value:.3f}" for k, value in result.pass_at.items() if k > 1]
        on = f"{result.num_prompts} prompts" + (f" of {result.name}" if result.name else "")
        self._print(Text(f"after {step} steps: {', '.join(scores)} over {on}", style="bold green"))

    def sample(self, prompt: Prompt, rollout: Rollout) -> None:
        self._print(_quoted(_question(prompt), "dim"))
        self._print(_quoted(rollout.text, "cyan"))
        self._print(Text(f"  reward {rollout.reward:g}"))

    def close(self) -> None:
        if self._progress is not None:
            self._live.stop()

    def _fitting(self, numbers: Sequence[str]) -> str:
        """As many of the numbers as one line of the panel has room for."""
        while len(text := " · ".join(numbers)) > _width(self._console) - 4:
            numbers = numbers[:-1]
        return text

    def _print(self, text: Text) -> None:
        # soft_wrap keeps each message on one line of a log file
        self._console.print(text, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=None),
        TextColumn("step"),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        expand=True,
    )


def _width(console: Console) -> int:
    """Of the panel, in columns."""
    return min(console.width, _WIDEST)


def duration(seconds: float) -> str:
    """Such as `1:02:03`, or `2:03` for less than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _question(prompt: Prompt) -> str:
    """The text of the prompt's last message."""
    content = prompt.source if isinstance(prompt.source, str) else prompt.source[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", f"<{part['type']}>") for part in content)


def _quoted(text: str, style: str) -> Text:
    shown = text if len(text) <= _LONGEST_SAMPLE else text[:_LONGEST_SAMPLE] + " ..."
    return Text("\n".join(f"  │ {line}" for line in shown.splitlines() or [""]), style=style)
