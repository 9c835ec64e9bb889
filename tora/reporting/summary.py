"""What a run reports when it ends: the reward curve and a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tora.reporting.console import duration
from tora.reporting.evaluation import EvalResult
from tora.reporting.metrics import read_rows

_BLUE, _ORANGE, _GREY = "#2563eb", "#c2410c", "#6b7280"


def reward_curve(metrics_jsonl: Path, out_png: Path) -> None:
    """Plots training reward and held-out reward over steps, with the name of the run's folder as title.

    The axes are empty if there are no rows. Overwrites `out_png`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(metrics_jsonl)
    reward = _series(rows, "reward/mean")
    held_out = _series(rows, "eval/reward")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.set_title(metrics_jsonl.absolute().parent.name, loc="left", fontweight="bold", fontsize=13, pad=14)
    axis.set_xlabel("step", color=_GREY)
    _style(axis)
    axis.set_ylabel("reward", color=_GREY)
    _draw_reward(axis, *reward)
    _draw_held_out(axis, *held_out)
    values = np.concatenate([reward[1], held_out[1]])
    if values.size and values.min() >= 0:
        axis.set_ylim(0, 1.05 * max(1.0, values.max()) if values.max() <= 1.2 else 1.05 * values.max())
    lines = axis.get_legend_handles_labels()[0]
    beside_title = {"loc": "lower right", "bbox_to_anchor": (1, 1.015), "ncols": 2, "borderaxespad": 0}
    axis.legend(handles=lines, frameon=False, labelcolor="#374151", **beside_title)
    figure.savefig(out_png)


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows with a finite value for `key`, each [rows]."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centered moving average over about a tenth of the run; the window shrinks at both ends."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _draw_reward(axis: Any, steps: np.ndarray, values: np.ndarray) -> None:
    axis.plot(steps, values, color=_BLUE, alpha=0.25, linewidth=1)
    axis.plot(steps, smooth(values), color=_BLUE, linewidth=2.2, solid_capstyle="round", label="training reward")


def _draw_held_out(axis: Any, steps: np.ndarray, values: np.ndarray) -> None:
    look = {"color": _ORANGE, "linewidth": 1.2, "markersize": 8, "markeredgecolor": "white"}
    axis.plot(steps, values, "o-", label="held-out reward", **look)
    for index in sorted({0, len(steps) - 1} if len(steps) else ()):
        # The lower of the two end points has its number below, the higher one above, so neither covers the line.
        below = values[index] < values[-1 - index]
        axis.annotate(
            f"{values[index]:.2f}",
            (steps[index], values[index]),
            textcoords="offset points",
            xytext=(0, -10 if below else 10),
            ha="center",
            va="top" if below else "bottom",
            color=_ORANGE,
            fontweight="bold",
        )


def _style(axis: Any) -> None:
    for side in ("top", "left", "right"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_GREY)
    axis.tick_params(length=0, colors=_GREY)
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.03)


def _scores(name: str, *scores: tuple[float | None, str]) -> tuple[str, str]:
    """A row of the summary, of the scores that there are, each with what follows it."""
    return name, " -> ".join(f"[bold green]{value:.3f}[/]{when}" for value, when in scores if value is not None)


def print_summary(
    *,
    name: str,
    before: EvalResult | None,
    before_step: int,
    after: EvalResult | None,
    after_step: int,
    num_steps: int,
    seconds: float,
    result: Path,
    curve: Path,
    bytes_per_sync: int,
    outcome: str = "",
    best: Path | None = None,
    console: Console | None = None,
) -> None:
    """Prints the run as a table, with only the held-out scores that were measured.

    `before`, `after`: the evaluations after steps `before_step` and `after_step`. `result`: the folder of the trained
    policy, `best` that of the best one. `outcome`: how the run ended before its last step, as a clause.
    """
    table = Table(title=name, title_style="bold", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")  # users copy paths from here, so they are never cut
    if outcome:
        table.add_row("outcome", Text(outcome, style="bold yellow"))
    began = f" (after step {before_step})" if before_step else ""
    ended = f" (after step {after_step})" if after_step != num_steps else ""
    measured = after or before
    if measured is not None:
        rewards = (before and before.reward, began), (after and after.reward, ended)
        table.add_row(*_scores("held-out reward", *rewards))
    if measured is not None and measured.accuracy not in (None, measured.reward):
        accuracies = (before and before.accuracy, began), (after and after.accuracy, ended)
        table.add_row(*_scores("held-out accuracy", *accuracies))
    table.add_row("steps", f"{num_steps} in {duration(seconds)}")
    table.add_row("bytes per sync", f"{bytes_per_sync:,}")
    table.add_row(result.name, Text(str(result)))
    if best is not None:
        table.add_row("best", Text(str(best)))
    table.add_row("reward curve", Text(str(curve)))
    (console or Console()).print(table)
