"""TRL's whole signature, classes and instances, images, and where a function's mistake stands."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from actors.group_filter import shown
from tora.config.components import import_from
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.rewards.notes import Notes, TrainerState
from tora.rewards.printed import Printed
from tora.rewards.processes import RewardProcesses
from tora.rewards.rewarder import FunctionRewarder, build_rewarder
from tora.types import FailedReward, Prompt

SOURCE = """
def signed(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, answer, **rest):
    log_metric("length", sum(map(len, completion_ids)))
    log_extra("kind", [f"{c}!" for c in completions])
    print("step", trainer_state.global_step, "of", trainer_state.max_steps)
    return [1.0 if c == a else None for c, a in zip(completions, answer)]

def by_keyword(**kwargs):
    assert kwargs["trainer_state"].max_steps == 9 and set(kwargs) > {"log_metric", "log_extra", "completion_ids"}
    return [0.5] * len(kwargs["completions"])

def few(completions):
    return [2.0] * len(completions)

def sees(completions, images, image):
    assert image[0] is not None
    return [float(pictures[0].size[0]) for pictures in images]

async def waits(completions, log_metric, **rest):
    log_metric("waits", 3)
    return [0.0] * len(completions)

class Scorer:
    def __init__(self, *, scale=1.0):
        self.scale = scale

    def __call__(self, completions, **rest):
        return [self.scale * len(c) for c in completions]

class Broken:
    def __init__(self):
        raise OSError("no weights")

scorer = Scorer(scale=3.0)

def raises(completions, **rest):
    nothing = completions[0]["content"]
    return nothing

def extras(completions, log_extra, **rest):
    log_extra("kind", ["one"])
    return [0.0] * len(completions)
"""
PROMPT = Prompt(0, (1,), "question", {"answer": "2", "completions": ["hidden"], "trainer_state": 1})
STATE = TrainerState(4, 9)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trls.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("trls", "bad", "there"):
        sys.modules.pop(name, None)


def build(*names: str, **arguments: Any) -> FunctionRewarder:
    return build_rewarder([{"_component_": f"trls.{name}", **arguments} for name in names])


def ask(rewarder: Any, texts: list[str], prompt: Prompt = PROMPT) -> tuple[list[Any], Notes]:
    notes = Notes()
    return rewarder(prompt, texts, [[1] * len(text) for text in texts], state=STATE, notes=notes), notes


def test_every_argument_of_trls_signature() -> None:
    rows, notes = ask(build("signed", "by_keyword", "few", "waits"), ["2", "yes"])
    assert rows == [
        {"signed": 1.0, "by_keyword": 0.5, "few": 2.0, "waits": 0.0},
        {"signed": 0.0, "by_keyword": 0.5, "few": 2.0, "waits": 0.0},
    ]
    assert notes.metrics == {"length": [4.0], "waits": [3.0]}
    assert [notes.extras_at(place) for place in (0, 1)] == [{"kind": "2!"}, {"kind": "yes!"}]


def test_processes_return_what_was_logged_and_printed() -> None:
    rewards = [{"_component_": f"trls.{name}"} for name in ("signed", "few", "waits")]
    rewarder = RewardProcesses(rewards, timeout_s=20, num_processes=1, collects_prints=True)
    try:
        (_, notes), (_, again) = ask(rewarder, ["2", "yes"]), ask(rewarder, ["2"])
    finally:
        rewarder.close()
    assert notes.metrics == {"length": [4.0], "waits": [3.0]} and notes.printed == ["step 4 of 9"]
    assert notes.extras == {"kind": {0: "2!", 1: "yes!"}} and again.extras == {"kind": {0: "2!"}}


def test_classes_and_instances() -> None:
    assert ask(build("Scorer", scale=2.0), ["abc"])[0] == [{"Scorer": 6.0}]
    assert ask(build("scorer"), ["abc"])[0] == [{"scorer": 9.0}]
    with pytest.raises(ConfigError, match=r"trls.Broken cannot be made: it raised OSError: no weights \(.*trls.py, "):
        build("Broken")
    with pytest.raises(ConfigError, match=r"trls.Scorer has no argument 'scal'; the nearest is scale"):
        build("Scorer", scal=2.0)


def test_a_function_that_asks_for_images_gets_them() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "PNG")
    prompt = Prompt(0, (1,), "q", {}, (buffer.getvalue(),))
    rewarder = RewardProcesses([{"_component_": "trls.sees"}], timeout_s=20, num_processes=1)
    try:
        assert ask(rewarder, ["a", "b"], prompt)[0] == [{"sees": 6.0}] * 2
    finally:
        rewarder.close()


def test_a_mistake_is_shown_with_file_line_and_prompt(tmp_path: Path) -> None:
    rows, _ = ask(build("raises"), ["a"])
    assert isinstance(rows[0], FailedReward)
    line = next(i for i, text in enumerate(SOURCE.splitlines(), 1) if "nothing = " in text)
    assert rows[0].place == f' ({tmp_path}/trls.py, line {line}: nothing = completions[0]["content"])'
    assert rows[0].reason.startswith("raised TypeError: string indices")
    rows, _ = ask(build("extras"), ["a", "b"])
    assert isinstance(rows[0], FailedReward) and "has 1 values for 2 completions" in rows[0].reason
    assert shown(PROMPT) == "question" and shown(Prompt(0, (), "x" * 99, {})) == "..." + "x" * 80
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "see"}]}]
    assert shown(Prompt(0, (), chat, {})) == "<image> see"


def test_many_printed_lines_are_cut() -> None:
    printed = Printed(io.StringIO())
    printed.write("a\n" * 1000)
    assert printed.take()[-2:] == ["a", "... and 800 lines more"] and printed.take() == []


def test_a_dotted_name_alone_is_a_component(tmp_path: Path) -> None:
    rewards = "[trls.few, {_component_: trls.signed, weight: 2}]"
    (tmp_path / "mine.yaml").write_text(f"extends: quickstart.yaml\nrewards: {rewards}")
    cfg = load_config("mine.yaml", ["optimizer.lr=0.1"])
    assert cfg.rewards == [{"_component_": "trls.few"}, {"_component_": "trls.signed", "weight": 2}]
    cfg = load_config("mine.yaml", ["rewards=[trls.few]", "dataset=my_data.rows"])
    assert cfg.dataset == {"_component_": "my_data.rows"}
    with pytest.raises(ConfigError, match=r"rewards.0=.few. must hold _component_"):
        load_config("mine.yaml", ["rewards=[few]"])


def test_the_configs_folder_counts(tmp_path: Path) -> None:
    home = tmp_path / "project"
    home.mkdir()
    (home / "there.py").write_text("def f(completions):\n    return [1.0] * len(completions)")
    (home / "mine.yaml").write_text("extends: quickstart.yaml\nrewards: [there.f]")
    cfg = load_config("project/mine.yaml")
    assert cfg.import_from == [str(home)]
    import_from(cfg.import_from)
    rewarder = RewardProcesses(cfg.rewards, timeout_s=20, num_processes=1)
    try:
        assert ask(rewarder, ["a"])[0] == [{"f": 1.0}]
    finally:
        rewarder.close()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import nothing_of_this_name",
            r"ModuleNotFoundError: No module named 'nothing_of_this_name' \(.*bad.py, line 1\)",
        ),
        ("def f(:", r"SyntaxError: invalid syntax \(.*bad.py, line 1\)"),
        ("\n1 / 0", r"ZeroDivisionError: division by zero \(.*bad.py, line 2\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ConfigError, match=f"_component_=bad.f cannot be imported: {words}") as caught:
        build_rewarder([{"_component_": "bad.f"}])
    assert "\n" not in str(caught.value)
