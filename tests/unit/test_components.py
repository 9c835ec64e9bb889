"""`_component_` mappings: resolved, called or rejected with a message; and former paths that configs may still use."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from learner.loss.protocol import build_loss
from learner.optim import build_optimizer, build_schedule
from tora import rewards
from tora.config.components import check_component, check_reward, instantiate, locate
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.reporting.loggers import build_logger
from tora.rewards.processes import RewardProcesses
from tora.rewards.rewarder import build_rewarder
from tora.tasks.prompts import RunPrompts
from tora.types import Prompt

FORMER, PRESENT = "tora.tasks.rewards", "tora.rewards"


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory."""
    (tmp_path / "my_own_components.py").write_text(
        textwrap.dedent(
            """\
            def score(completions, *, scale=1.0):
                return [scale for _ in completions]

            def open_ended(**anything):
                return anything

            def loss():
                raise KeyError("x")

            def rows():
                raise FileNotFoundError("my.json")

            number = 3
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    return "my_own_components"


def test_instantiate(user_module: str) -> None:
    score = f"{user_module}.score"
    assert instantiate({"_component_": score, "scale": 2.0}, ["a", "b"]) == [2.0, 2.0]
    # keyword arguments are passed on if the callable accepts them and the config does not set them
    assert instantiate({"_component_": score}, ["a"], scale=3.0, num_training_steps=9) == [3.0]
    assert instantiate({"_component_": score, "scale": 2.0}, ["a"], scale=3.0) == [2.0]
    assert instantiate({"_component_": f"{user_module}.open_ended", "a": 1}, b=2) == {"a": 1, "b": 2}
    assert instantiate({"_component_": "builtins.dict", "a": 1}) == {"a": 1}


def test_instantiate_refuses(user_module: str) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "Missing key _component_"),
        ({"_component_": f"{user_module}.scor"}, "the nearest is score"),
        ({"_component_": "no_such_module_anywhere.f"}, "no_such_module_anywhere"),
        ({"_component_": f"{user_module}.number"}, "cannot be called"),
        ({"_component_": f"{user_module}.score", "scael": 1}, "the nearest is scale"),
        ({"_component_": f"{user_module}.score"}, "missing a required argument: 'completions'"),
    ]
    for component, words in cases:
        with pytest.raises(ConfigError, match=words):
            instantiate(component)


def test_a_module_that_fails_to_import_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_broken_rewards.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"ModuleNotFoundError: No module named 'not_installed_anywhere' \("):
        locate("my_broken_rewards.score")


# former paths


def test_a_config_with_former_paths_validates(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"extends: quickstart.yaml\nrewards:\n  - _component_: {FORMER}.math_answer\n    weight: 2\n")
    assert load_config(str(path)).rewards == [{"_component_": f"{FORMER}.math_answer", "weight": 2}]


@pytest.mark.parametrize("name", rewards.__all__)
def test_former_paths_resolve_to_the_current_callables(name: str) -> None:
    assert locate(f"{FORMER}.{name}") is locate(f"{PRESENT}.{name}") is getattr(rewards, name)


def test_former_paths_are_called_and_checked_like_current_ones() -> None:
    length = {"_component_": f"{FORMER}.length", "target": 2}
    assert instantiate(length, ["q"], ["abc"]) == [0.5]
    check_component(length, "rewards.0")
    check_reward({**length, "weight": 2, "name": "short"}, "rewards.0")


@pytest.mark.parametrize(
    ("component", "sentence"),
    [
        (
            {"_component_": f"{FORMER}.length", "targte": 2},
            f"rewards.0.targte=2 is not an argument of {PRESENT}.length; the nearest is target.",
        ),
        (
            {"_component_": f"{FORMER}.lenght"},
            f'rewards.0._component_="{PRESENT}.lenght" does not exist; the nearest is {PRESENT}.length.',
        ),
    ],
)
def test_mistakes_under_a_former_path_name_the_current_one(component: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_reward(component, "rewards.0")
    assert str(error.value) == sentence


def test_former_paths_reach_the_rewarder_here_and_in_its_processes() -> None:
    components = [{"_component_": f"{FORMER}.answer_tag"}, {"_component_": f"{FORMER}.length", "target": 40}]
    prompt = Prompt(0, (1,), "1 + 1 =", {"answer": "2"})
    expected = [{"answer_tag": 1.0, "length": 1.0}]
    assert build_rewarder(components)(prompt, ["<answer>2</answer>"], [[1]]) == expected
    processes = RewardProcesses(components, timeout_s=30, num_processes=1)
    try:
        assert processes(prompt, ["<answer>2</answer>"], [[1]]) == expected
    finally:
        processes.close()


def test_former_paths_reach_a_metric_logger(tmp_path: Path) -> None:
    """Only reward functions have former paths, so one stands in: the error shows that its signature was read."""
    with pytest.raises(ConfigError, match="missing a required argument: 'prompts'"):
        build_logger({"_component_": f"{FORMER}.answer_tag"}, load_config("quickstart"), tmp_path, "id")


MINE = "my_own_components"
RAISING = {
    "optimizer": ("torch.optim.AdamW", {"lr": 1e-3, "eps": "1e-8"}, '"eps": "1e-8"}: it raised TypeError: '),
    "lr_scheduler": ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1}, "it raised ValueError: You must define"),
    "loss": (f"{MINE}.loss", {}, f'/{MINE}.py, line 8: raise KeyError("x"))'),
    "dataset": (f"{MINE}.rows", {}, f"/{MINE}.py, line 11: raise FileNotFoundError"),
}


@pytest.mark.parametrize("key", RAISING)
def test_a_component_that_raises_is_one_sentence(key: str, user_module: str) -> None:
    path, arguments, words = RAISING[key]
    component = {"_component_": path, **arguments}
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError) as caught:
        if key == "optimizer":
            build_optimizer(component, [parameter])
        elif key == "loss":
            build_loss(component)
        elif key == "dataset":
            RunPrompts(load_config("quickstart", [f"dataset={MINE}.rows"]))
        else:
            build_schedule(component, torch.optim.SGD([parameter], lr=1.0), 4)
    sentence = str(caught.value)
    assert sentence.startswith(f"{key}: {path} cannot be made"), sentence
    assert words in sentence and "\n" not in sentence, sentence
