"""`tora report` and `tora compare`: a run, or several, as one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from tora.config.convert import show
from tora.config.reference import entries
from tora.errors import ConfigError
from tora.reporting.charts import line_chart, short, timeline
from tora.reporting.completions import content_text, read_parquet
from tora.reporting.metrics import read_rows

Row = dict[str, Any]
STALENESS = ("staleness/mean", "staleness/max")
CHARTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Reward", ("reward/mean", "eval/reward"), "training, and held out"),
    ("Accuracy", ("eval/accuracy", "eval/pass@1", "eval/pass@4", "eval/pass@8"), "held out"),
    ("Length", ("rollout/length_mean", "eval/length_mean"), "sampled tokens"),
    ("Cut off", ("rollout/truncated_share",), "share of rollouts"),
    ("Groups with a signal", ("rollout/signal_share",), "share"),
    ("KL to the reference", ("kl/mean",), "a token"),
    ("Mismatch of engine and learner", ("mismatch_kl", "policy_kl"), "KL, before the update"),
    ("Staleness", STALENESS, "policy versions"),
    ("Entropy", ("policy/entropy",), "nats a token"),
    ("Gradient norm", ("learner/grad_norm",), "before clipping"),
    ("Learning rate", ("learner/lr",), ""),
    ("Tokens per second", ("rollout/tokens_per_s",), "generated"),
    ("Sync", ("sync/seconds",), "seconds"),
)
"""Title, metrics and note of each chart; one without values is left out."""
_FAILURES = ("learner/bad_step", "reward/failed_share", "rollout/bad_logprobs", "rollout/workers_lost")
_SHOWN = 5


def report(run: Path) -> str:
    """The page of one run. Raises ConfigError if the folder is no run."""
    config, rows = read_run(run)
    steps = [row for row in rows if "version" in row]
    memory = sorted({key for row in rows for key in row if "memory" in key})
    chosen = (*_charts_of(rows), ("Memory", memory, "GiB"))
    charts = [line_chart(title, _series(rows, keys), note) for title, keys, note in chosen]
    times = [(row["step"] + 1, row.get("time/rollout_s") or 0.0, row.get("time/learner_s") or 0.0) for row in steps]
    parts = [
        f"<h1>{escape(str(config.get('name', run.name)))}</h1>",
        _facts(config, rows),
        f"<section class='charts'>{''.join(charts)}{timeline(times)}</section>" if rows else "<p>No step yet.</p>",
        _completions(run),
        _failures(steps),
        _settings(config),
    ]
    return _page(str(config.get("name", run.name)), parts)


def compare(runs: Sequence[Path]) -> str:
    """One page with the curves of several runs over each other, and the settings that differ."""
    labels = _labels(runs)
    read = {label: read_run(run) for label, run in zip(labels, runs, strict=True)}
    charts = []
    for title, keys, note in _charts_of([row for _, rows in read.values() for row in rows]):
        for key in keys:
            series = {label: _points(rows, key) for label, (_, rows) in read.items()}
            charts.append(line_chart(f"{title}: {key}", series, note))
    flat = {label: dict(_flat(config)) for label, (config, _) in read.items()}
    keys = sorted({key for each in flat.values() for key in each} - {"output_dir", "name", "run_id"})
    differing = [key for key in keys if len({each.get(key) for each in flat.values()}) > 1]
    body = [[key, *(each.get(key, "") for each in flat.values())] for key in differing]
    table = _table(body, ["setting", *flat]) if body else "<p>No setting differs.</p>"
    parts = [
        f"<h1>{escape(' and '.join(labels))}</h1>",
        f"<section class='charts'>{''.join(charts)}</section>",
        f"<h2>Settings that differ</h2>{table}",
    ]
    return _page(" and ".join(labels), parts)


def read_run(run: Path) -> tuple[dict[str, Any], list[Row]]:
    """Config and rows. Raises ConfigError if the folder is no run."""
    if not all((run / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{run} is no run: it has no config.yaml and metrics.jsonl.")
    config = yaml.safe_load((run / "config.yaml").read_text())
    return config if isinstance(config, dict) else {}, read_rows(run / "metrics.jsonl")


def _charts_of(rows: Sequence[Row]) -> list[tuple[str, tuple[str, ...], str]]:
    """`CHARTS`, without the staleness of synchronous runs, which is 0."""
    is_stale = any(row.get(key) for row in rows for key in STALENESS)
    return [chart for chart in CHARTS if is_stale or chart[1] != STALENESS]


def _labels(runs: Sequence[Path]) -> list[str]:
    names = [run.absolute().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """A training row is drawn at the steps completed after it, as an evaluation is."""
    return [(row["step"] + ("version" in row), row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _series(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    return {key: _points(rows, key) for key in keys}


def _facts(config: Mapping[str, Any], rows: Sequence[Row]) -> str:
    model = config.get("model") or {}
    last: Row = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    steps = max((row["step"] + 1 for row in rows if "version" in row), default=0)
    facts = [
        ("steps", f"{steps} of {config.get('num_steps')}"),
        ("reward", _last(last, "reward/mean")),
        ("held-out reward", _last(last, "eval/reward")),
        ("tokens/s", _last(last, "rollout/tokens_per_s")),
        ("model", Path(str(model.get("path", ""))).name),
        ("trained", str(model.get("lora_type", ""))),
    ]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts if value)
    return f"<dl class='facts'>{cells}</dl>"


def _last(row: Row, key: str) -> str:
    return short(row[key]) if key in row else ""


def _completions(run: Path) -> str:
    """The best and the worst rollouts of the newest table, alike ones once."""
    files = sorted((run / "completions").glob("step_*.parquet"), key=lambda file: int(file.stem[5:]))
    if not files:
        return ""
    different = {(row["prompt"], row["completion"], row["reward"]): row for row in read_parquet(files[-1])}
    rows = sorted(different.values(), key=lambda row: row["reward"])
    worst, best = rows[:_SHOWN], rows[::-1][:_SHOWN]
    step = files[-1].stem[5:]
    return "".join(
        f"<h2>{title} completions of step {step}</h2>{''.join(_completion(row) for row in chosen)}"
        for title, chosen in (("Best", best), ("Worst", worst))
    )


def _completion(row: Row) -> str:
    scores = [(key.removeprefix("reward/"), row[key]) for key in row if key == "reward" or key.startswith("reward/")]
    scores += [(key, row.get(key)) for key in ("advantage", "length", "turns", "tool_calls", "tool_errors")]
    marks = "".join(f"<span>{escape(n)} <b>{short(float(v))}</b></span>" for n, v in scores if v is not None)
    images = "".join(
        f"<img alt='image' src='data:{_mime(image['bytes'])};base64,{_encoded(image['bytes'])}'>"
        for image in row.get("images") or ()
    )
    return (
        f"<article><div class='legend'>{marks}</div>{images}<pre class='prompt'>{escape(row['prompt'])}</pre>"
        f"{_conversation(row)}</article>"
    )


def _conversation(row: Row) -> str:
    """A completion as text; an episode message by message."""
    if not row.get("messages"):
        return f"<pre>{escape(row['completion'])}</pre>"
    return "".join(
        f"<p class='note'>{escape(message['role'])}</p><pre>{escape(_said(message))}</pre>"
        for message in json.loads(row["messages"])
    )


def _said(message: Row) -> str:
    """A message's text and its calls: `look({"place": "top left"})`."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    shown = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return "\n".join(text for text in (content_text(message.get("content")), *shown) if text)


def _mime(image: bytes) -> str:
    kind = "jpeg" if image[:2] == b"\xff\xd8" else "png"
    return f"image/{kind}"


def _encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def _failures(steps: Sequence[Row]) -> str:
    found = [
        [str(row["step"] + 1), key, short(float(row[key]))]
        for row in steps
        for key in row
        if (key in _FAILURES or key.startswith("reward/failed/")) and row[key]
    ]
    nothing = [[str(row["step"] + 1), "trained nothing", ""] for row in steps if row.get("learner/tokens") == 0]
    rows = [*found, *nothing][:200]
    return f"<h2>Failures</h2>{_table(rows, ['step', 'what', 'value']) if rows else '<p>None.</p>'}"


def _settings(config: Mapping[str, Any]) -> str:
    """Those that are not the defaults, and folded away the others."""
    usual = {entry.key: entry.default for entry in entries()}
    set_here = [(key, value) for key, value in _flat(config) if usual.get(key) != value]
    left = [(key, value) for key, value in _flat(config) if usual.get(key) == value]
    folded = (
        f"<details><summary>{len(left)} settings at their defaults</summary>{_table(left)}</details>" if left else ""
    )
    return f"<h2>Settings</h2>{_table(set_here)}{folded}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys, and values as a config spells them."""
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        pairs += (
            _flat(value, f"{name}.")
            if isinstance(value, Mapping) and value
            else [(name, value if isinstance(value, str) else show(value, longest=200))]
        )
    return pairs


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("key", "value")) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(text: str) -> str:
    """Breaks in a narrow column come after dots and underscores first."""
    return f"<td>{re.sub(r'(?<=[._/])(?=[^._/])', '<wbr>', escape(text))}</td>"


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#111827;--dim:#6b7280;--line:#e5e7eb;--card:#f9fafb}
@media(prefers-color-scheme:dark){:root{--bg:#0f1115;--fg:#e5e7eb;--dim:#9ca3af;--line:#2b3038;--card:#171a20}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1240px;padding:16px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;
margin:1.6em 0 .6em}h3{font-size:.95rem;margin:0}.note{color:var(--dim);font-size:.8rem;margin:0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:8px;margin:12px 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 10px}dt{color:var(--dim);
font-size:.8rem}dd{margin:0;font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:12px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px;min-width:0}
figure.wide{grid-column:1/-1}svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font-size:12px}
.grid{stroke:var(--line)}polyline{fill:none;stroke-width:1.8}.legend{display:flex;flex-wrap:wrap;gap:4px 14px;
font-size:.8rem;color:var(--dim)}.legend b{color:var(--fg)}.legend i{display:inline-block;width:10px;height:10px;
border-radius:3px;margin-right:5px}
article{border:1px solid var(--line);border-radius:8px;padding:10px;margin:8px 0;background:var(--card)}
pre{white-space:pre-wrap;margin:6px 0 0;font:13px/1.45 ui-monospace,monospace;max-height:320px;overflow:auto}
.prompt{color:var(--dim)}img{max-width:160px;max-height:160px;margin:6px 6px 0 0;border-radius:4px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;width:100%}th,td{text-align:left;
padding:3px 8px;border-bottom:1px solid var(--line);vertical-align:top}td{min-width:7em}td:first-child{min-width:9em}
summary{cursor:pointer;color:var(--dim);margin:8px 0}
"""
_LIGHT = ("#2563eb", "#c2410c", "#059669", "#9333ea", "#a16207", "#0e7490")
_DARK = ("#60a5fa", "#fb923c", "#34d399", "#c084fc", "#facc15", "#22d3ee")


def _page(title: str, parts: Sequence[str]) -> str:
    light, dark = map(_colors, (_LIGHT, _DARK))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<style>{_STYLE}{light}@media(prefers-color-scheme:dark){{{dark}}}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _colors(colors: Sequence[str]) -> str:
    """Of the lines, dots and legends of a chart's series, in order."""
    return "".join(
        f".c{i}{{stroke:{color}}}circle.c{i}{{fill:{color}}}.b{i}{{background:{color};fill:{color}}}"
        for i, color in enumerate(colors)
    )
