"""The HTML pages of `tora report` and `tora compare`, read as text, and in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, Page, browser
from fakes import make_group, make_prompt
from tiny import picture

from tora.cli import main
from tora.reporting.charts import line_chart, short, timeline
from tora.reporting.completions import rollout_rows, write_parquet
from tora.reporting.page import compare, report

SCRIPT = "<script>alert(1)</script>"


def make_run(folder: Path, *, lr: float = 1e-3, steps: int = 5) -> Path:
    folder.mkdir()
    config = {
        "name": folder.name,
        "num_steps": 9,
        "model": {"path": "/a/tiny"},
        "optimizer": {"lr": lr},
        "note": SCRIPT,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows: list[dict] = [{"step": 0, "eval/reward": 0.125}]
    for step in range(steps):
        times = {"time/rollout_s": 1.5, "time/learner_s": 0.5, "learner/tokens": 0 if step == 3 else 9}
        memory = {"memory/learner_gib": 1.5}
        rows.append(
            {"step": step, "version": step + 1, "reward/mean": 0.25 + step / 8, "loss/total": None, **times, **memory}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    group = make_group(make_prompt(1), [0.0, 1.0])
    prompt = replace(group.prompt, source=SCRIPT, images=(picture(16, 16),))
    write_parquet(rollout_rows([replace(group, prompt=prompt)], [[-1.0, 1.0]]), folder / "completions/step_10.parquet")
    write_parquet(rollout_rows([group], [[-1.0, 1.0]]), folder / "completions/step_9.parquet")
    return folder


EPISODE = [
    {"role": "environment", "content": " It is a number."},
    {
        "role": "assistant",
        "content": "I <try>.",
        "tool_calls": [{"type": "function", "function": {"name": "guess", "arguments": {"number": 7}}}],
    },
    {"role": "tool", "name": "guess", "content": [{"type": "image"}, {"type": "text", "text": "higher"}]},
]


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "wbr":
            self.text = self.text.removesuffix(" ")
        elif tag not in ("meta", "img", "line", "circle", "polyline", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def parsed(page: str) -> str:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return parser.text


def test_a_report_has_settings_curves_completions_images_and_failures(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "one"))
    text = parsed(page)
    for words in ("5 of 9", "optimizer.lr", "0.001", "Best completions of step 10", "Worst", "trained nothing"):
        assert words in text, words
    assert (
        "data:image/png;base64," in page
        and page.count("<polyline") == 3
        and "memory/learner_gib" in text
        and "waiting for generation" in text
    )
    assert "<script" not in page and SCRIPT in text, "what a prompt holds is text"
    assert not re.search(r"(src|href)=['\"]?http", page), "it needs no network"


def test_a_comparison_overlays_and_shows_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=2e-3)]
    text = parsed(compare(runs))
    settings = text[text.index("Settings that differ") :]
    assert "optimizer.lr" in settings and "0.002" in settings and "num_steps" not in settings
    assert compare(runs).count("<polyline") == 4
    assert "No setting differs" in compare([runs[0], runs[0]])


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    (run / "metrics.jsonl").write_text("")
    shutil.rmtree(run / "completions")
    assert "No step yet" in parsed(report(run))


@pytest.mark.parametrize("words", [["report", "{tmp}"], ["compare", "{tmp}"], ["compare", "{tmp}", "{tmp}"]])
def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main([word.format(tmp=tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("is no run" in error or "two runs or more" in error)
    assert not list(tmp_path.iterdir())


def test_charts_leave_out_what_is_not_finite() -> None:
    nan = float("nan")
    assert line_chart("a", {"x": [(0, nan)], "y": []}) == "" and timeline([(0, nan, 1)]) == "" and timeline([]) == ""
    chart = line_chart("a", {"x": [(0, 1.0), (1, nan), (2, 1.0)]})
    assert chart.count("<circle") == 2 and "nan" not in chart
    assert [short(v) for v in (0, 0.5, 1e-7, 12345.0)] == ["0", "0.5", "1.0e-07", "12,345"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


READ = """({
    inside: document.documentElement.scrollWidth <= innerWidth,
    width: innerWidth,
    steps: document.querySelector('dd')?.textContent ?? null,
    lines: document.querySelectorAll('polyline').length,
    low: [...document.querySelectorAll('svg text')].every(text => text.getBoundingClientRect().left >= 0),
    contrast: Math.min(...[...document.querySelectorAll('polyline, .legend i, td, .note, pre, svg text')].map(contrast))
})"""
CONTRAST = """
function light(color) {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
}
function contrast(part) {
    const seen = getComputedStyle(part)
    const shown = part.tagName == 'polyline' ? seen.stroke : part.tagName == 'text' ? seen.fill
        : part.tagName == 'I' ? seen.backgroundColor : seen.color
    const [a, b] = [shown, getComputedStyle(document.body).backgroundColor].map(light).sort((x, y) => y - x)
    return (a + 0.05) / (b + 0.05)
}
"""
"""WCAG 2.2's contrast ratio: 3 for graphics and large text, 4.5 for text."""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_values_legibly_and_nothing_is_wider_than_the_screen(
    tmp_path: Path, page: Page, width: int, dark: bool
) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=2e-3)
    pages = {"one": (report(one), "5 of 9", 3), "both": (compare([one, two]), None, 4)}
    for name, (text, steps, lines) in pages.items():
        (tmp_path / f"{name}.html").write_text(text)
        page.open(tmp_path / f"{name}.html", width=width, dark=dark)
        page.evaluate(CONTRAST + "0")
        seen = page.evaluate(READ)
        assert seen["inside"] and seen["low"] and seen["width"] == width, name
        assert (seen["steps"], seen["lines"]) == (steps, lines), name
        assert seen["contrast"] > 4, (name, seen)


def test_settings_at_their_defaults_are_folded_away_and_alike_completions_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "top_p": 1.0, "min_p": 0.25, "eval": None}))
    group = make_group(make_prompt(1), [1.0, 1.0, 1.0, 0.0])
    write_parquet(rollout_rows([group, group], [[0.0] * 4] * 2), run / "completions/step_11.parquet")
    text = report(run)
    settings, folded = text[text.index("<h2>Settings") :].split("<details>")
    assert "min_p" in settings.replace("<wbr>", "") and "top_p" not in settings.replace("<wbr>", "")
    assert "2 settings at their defaults" in folded and "top_p" in folded.replace("<wbr>", "")
    assert text.count("<article>") == 2 * len({rollout.text for rollout in group.rollouts})


def test_staleness_is_drawn_where_there_is_any(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    for worst in (0.0, 2.0):
        row = {"step": 5, "version": 6, "staleness/mean": worst / 2, "staleness/max": worst}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        assert ("Staleness" in report(run)) == ("Staleness" in compare([run, run])) == (worst > 0)


def test_the_axis_of_what_is_never_negative_starts_at_zero() -> None:
    assert ">0</text>" in line_chart("lr", {"lr": [(0, 1e-5), (1, 1e-3)]})


def test_an_episode_is_shown_message_by_message(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    group = make_group(make_prompt(1), [0.0, 1.0])
    shown = [replace(r, messages=EPISODE, turns=2, tool_calls=1, images=(picture(8, 8),)) for r in group.rollouts]
    rows = rollout_rows([replace(group, rollouts=tuple(shown))], [[-1.0, 1.0]])
    assert json.loads(rows[0]["messages"]) == EPISODE and len(rows[0]["images"]) == 1
    write_parquet(rows, folder / "completions/step_11.parquet")
    page = report(folder)
    assert page.count("data:image/png") == 4, "both episodes are among the best and the worst"
    for text in ("turns  2", "tool_calls  1", "environment", 'I <try>.\nguess({"number": 7})', "<image> higher"):
        assert text in parsed(page), text
