"""What a run reports when it ends: the reward curve and a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tora.reporting.console import duration
from tora.reporting.metrics import read_rows

_BLUE, _ORANGE, _GREY = "#2563eb", "#c2410c", "#6b7280"


def reward_curve(metrics_jsonl: Path, out_png: Path) -> None:
    """Plots training reward and held-out accuracy over steps, with the name of the run's folder as title.

    The axes are empty if there are no rows. Overwrites `out_png`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(metrics_jsonl)
    reward = _series(rows, "reward/mean")
    accuracy = _series(rows, "eval/accuracy")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.set_title(metrics_jsonl.absolute().parent.name, loc="left", fontweight="bold", fontsize=13, pad=14)
    axis.set_xlabel("step", color=_GREY)
    _style(axis)
    _draw_reward(axis, *reward)
    _draw_accuracy(_accuracy_axis(axis, reward[1]), *accuracy)
    lines = [line for each in figure.axes for line in each.get_legend_handles_labels()[0]]
    beside_title = {"loc": "lower right", "bbox_to_anchor": (1, 1.015), "ncols": 2, "borderaxespad": 0}
    axis.legend(handles=lines, frameon=False, labelcolor="#374151", **beside_title)
    figure.savefig(out_png)


def _accuracy_axis(axis: Any, rewards: np.ndarray) -> Any:
    """The axis for accuracy: the reward's own if rewards have the same scale, otherwise a second one on the right."""
    if rewards.size == 0 or (rewards.min() >= 0 and rewards.max() <= 1.2):
        axis.set_ylabel("reward, accuracy", color=_GREY)
        axis.set_ylim(0, max(1.05, 1.05 * rewards.max(initial=0)))
        return axis
    axis.set_ylabel("training reward", color=_BLUE)
    right = axis.twinx()
    right.set_ylabel("held-out accuracy", color=_ORANGE)
    right.set_ylim(0, 1.05)
    _style(right)
    right.grid(False)
    return right


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


def _draw_accuracy(axis: Any, steps: np.ndarray, values: np.ndarray) -> None:
    look = {"color": _ORANGE, "linewidth": 1.2, "markersize": 8, "markeredgecolor": "white"}
    axis.plot(steps, values, "o-", label="held-out accuracy", **look)
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


def print_summary(
    *,
    name: str,
    accuracy_before: float | None,
    accuracy_after: float | None,
    num_steps: int,
    seconds: float,
    adapter: Path,
    curve: Path,
    bytes_per_sync: int,
    console: Console | None = None,
) -> None:
    """Prints the run as a table, without accuracies if there was no evaluation."""
    table = Table(title=name, title_style="bold", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")  # users copy paths from here, so they are never cut
    if accuracy_before is not None and accuracy_after is not None:
        table.add_row("held-out accuracy", f"[bold green]{accuracy_before:.3f} -> {accuracy_after:.3f}")
    table.add_row("steps", f"{num_steps} in {duration(seconds)}")
    table.add_row("bytes per sync", f"{bytes_per_sync:,}")
    table.add_row("adapter", Text(str(adapter)))
    table.add_row("reward curve", Text(str(curve)))
    (console or Console()).print(table)
