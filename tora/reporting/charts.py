"""Line charts as inline SVG, for pages that need no script and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 420, 190, 58, 24, 10
NUM_COLORS = 6


def line_chart(title: str, series: Mapping[str, Points], note: str = "") -> str:
    """A figure with one line per series, or its dots if it is short. Values that are not finite are left out; an empty
    string if nothing is left. `note`: what the numbers mean."""
    lines = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, high = _padded(min(ys), max(ys))
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) * (_WIDTH - _LEFT - 10)
        return _LEFT + across, _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    marks = []
    for tick in (low, (low + high) / 2, high):
        y = at(left, tick)[1]
        marks.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick, anchor in ((left, "start"), (right, "end")):
        marks.append(f'<text x="{at(tick, low)[0]:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{tick:g}</text>')
    for number, (_, points) in enumerate(lines.items()):
        kind = f"c{number % NUM_COLORS}"
        placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        marks.append(f'<polyline class="{kind}" points="{placed}"/>')
        if len(points) <= 20:
            marks += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in (at(*p) for p in points)]
    legend = "".join(
        f'<span><i class="b{number % NUM_COLORS}"></i>{escape(name)} <b>{short(points[-1][1])}</b></span>'
        for number, (name, points) in enumerate(lines.items())
    )
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}"'
    caption = f"<h3>{escape(title)}</h3><p class='note'>{escape(note)}</p>" if note else f"<h3>{escape(title)}</h3>"
    return f"<figure>{caption}<svg {box}>{''.join(marks)}</svg><div class='legend'>{legend}</div></figure>"


def timeline(steps: Sequence[tuple[float, float, float]]) -> str:
    """Bars of how each step's time was spent. `steps`: step, seconds of waiting for rollouts, seconds of learning."""
    kept = [step for step in steps if all(map(math.isfinite, step))]
    if not kept:
        return ""
    every = -(-len(kept) // 120)
    shown = kept[::every]
    longest = max(rollout + learner for _, rollout, learner in shown) or 1.0
    width, bars = 860 / len(shown), []
    for number, (step, rollout, learner) in enumerate(shown):
        x, tall = 20 + number * width, 150 / longest
        a, b = rollout * tall, learner * tall
        about = f"step {step:g}: {rollout:.2f} s generation, {learner:.2f} s learning"
        bars.append(
            f'<g><title>{about}</title><rect class="b0" x="{x:.1f}" y="{160 - a:.1f}" width="{width * 0.85:.1f}" '
            f'height="{a:.1f}"/><rect class="b1" x="{x:.1f}" y="{160 - a - b:.1f}" width="{width * 0.85:.1f}" '
            f'height="{b:.1f}"/></g>'
        )
    legend = '<span><i class="b0"></i>waiting for generation</span><span><i class="b1"></i>learning</span>'
    return (
        f"<figure class='wide'><h3>Time of a step, up to {longest:.3g} s</h3><svg viewBox='0 0 900 170' role='img' "
        f"aria-label='timeline'>{''.join(bars)}</svg><div class='legend'>{legend}</div></figure>"
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - room if low < 0 else max(0.0, low - room)), high + room


def short(value: float) -> str:
    """Three significant digits, or a whole number from a thousand on."""
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.1e}"
