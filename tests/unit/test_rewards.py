"""Reward functions, alone and called by the rewarder."""

from __future__ import annotations

import math
import pickle
import threading
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch

from tora import rewards
from tora.errors import ConfigError
from tora.rewards.math_judge import MathJudge
from tora.rewards.rewarder import FunctionRewarder, build_rewarder
from tora.types import FailedReward, Prompt

R = "tora.rewards"
TEXT = Prompt(0, (1,), "1 + 1 =", {"answer": "2", "level": 3})
CHAT = Prompt(0, (1,), [{"role": "user", "content": "1 + 1 ="}], {"answer": "2"})


def rewarder(function, name: str = "mine", weight: float = 1.0) -> FunctionRewarder:
    return FunctionRewarder(((name, function, weight),))


def score(scorer: FunctionRewarder, prompt: Prompt, texts: list[str]) -> list[dict[str, float]]:
    """Scores texts whose tokens are their characters."""
    return scorer(prompt, texts, [[ord(c) for c in text] for text in texts])


# functions


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>2</answer>", 1),
        ("1 + 1 = 2\n<answer> 2 </answer>\n", 1),
        ("<answer>3</answer>", 0),
        ("<answer>2</answer> I think", 0),
        ("<answer>3</answer><answer>2</answer>", 1),
        ("<answer>2<answer>", 0),
        ("The answer is 2.", 0),
        ("<answer>2.0</answer>", 0),
    ],
)
def test_answer_tag(text: str, score: float):
    assert rewards.answer_tag(["q"], [text], answer=[2]) == [score]


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("72", r"so \boxed{72}", 1),
        ("72", r"first \boxed{71}, no: \boxed{72}", 1),
        ("72", "<answer>72.0</answer>", 1),
        ("72", "72", 0),
        ("1234", "<answer>$1,234.</answer>", 1),
        ("1/2", r"\boxed{\frac{1}{2}}", 1),
        ("0.5", r"<answer>$\frac{1}{2}$</answer>", 1),
        (r"\boxed{x+1}", r"\boxed{1+x}", 1),
        ("x+1", r"\boxed{x}", 0),
        ("Paris", "<answer>Paris</answer>", 1),
        ("Paris", "<answer>Rome</answer>", 0),
        ("72", r"\boxed{72", 0),
        ("72", r"\boxed{}", 0),
    ],
)
def test_math_answer(gold: str, text: str, score: float):
    assert rewards.math_answer(["q"], [text], answer=[gold]) == [score]


def test_math_answer_in_many_threads():
    wrong: list[int] = []

    def score(n: int) -> None:
        texts = [rf"\boxed{{\frac{{{n + k}}}{{7}}}}" for k in range(3)]
        if rewards.math_answer(["q"] * 3, texts, answer=[rf"\frac{{{n}}}{{7}}"] * 3) != [1, 0, 0]:
            wrong.append(n)

    threads = [threading.Thread(target=score, args=(n,)) for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_answer_that_hangs_sympy_is_wrong_and_the_next_one_is_judged():
    judge = MathJudge(cpu_seconds=1)
    start = time.perf_counter()
    assert not judge.equal(r"\boxed{10}", r"\boxed{9^{9^{9^9}}}")
    assert time.perf_counter() - start < 20
    assert judge.equal(r"\boxed{\frac{1}{2}}", r"\boxed{\frac{2}{4}}")
    judge.close()


def test_format():
    texts = ["why\n<answer>2</answer>\n", "<answer>2</answer><answer>2</answer>", "2", "<answer></answer>"]
    assert rewards.format(["q"] * 4, texts) == [1, 0, 0, 0]
    assert rewards.format(["q"] * 2, ["a\nb", "b"], pattern="a.*") == [1, 0]


def test_length_falls_from_target_to_limit():
    texts = ["x" * n for n in (0, 10, 15, 20, 99)]
    assert rewards.length(["q"] * 5, texts, target=10) == [1, 1, 0.5, 0, 0]
    assert rewards.length(["q"] * 5, texts, target=10, limit=15) == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="target < limit"):
        rewards.length(["q"], ["x"], target=10, limit=5)


def test_overlong_is_dapos_equation_13():
    lengths = [0, 12, 13, 14, 16, 17]
    ids = [list(range(n)) for n in lengths]
    scores = rewards.overlong(["q"] * 6, [""] * 6, ids, max_tokens=16, buffer=4)
    assert scores == [0, 0, -0.25, -0.5, -1, -1]
    for bounds in ({"max_tokens": 4, "buffer": 5}, {"max_tokens": 4, "buffer": 0}):
        with pytest.raises(ValueError, match="0 < buffer <= max_tokens"):
            rewards.overlong(["q"], [""], [[]], **bounds)


# the rewarder


def test_called_once_a_group_as_trl_calls():
    calls = []

    def mine(prompts, completions, answer, level, **columns):
        calls.append((prompts, completions, answer, level, columns))
        return [1.0, 0]

    assert score(rewarder(mine), TEXT, ["a", "b"]) == [{"mine": 1.0}, {"mine": 0.0}]
    trls = {key: calls[0][-1].pop(key) for key in ("completion_ids", "trainer_state", "log_metric", "log_extra")}
    assert calls == [(["1 + 1 ="] * 2, ["a", "b"], ["2"] * 2, [3] * 2, {})]
    assert trls["completion_ids"] == [[97], [98]]


def test_chat_prompts_get_chat_completions():
    def mine(prompts, completions, **columns):
        assert prompts == [CHAT.source]
        assert completions == [[{"role": "assistant", "content": "<answer>2</answer>"}]]
        return [0.5]

    assert score(rewarder(mine), CHAT, ["<answer>2</answer>"]) == [{"mine": 0.5}]
    for name in ("answer_tag", "math_answer", "format"):
        assert score(build_rewarder([{"_component_": f"{R}.{name}"}]), CHAT, ["<answer>2</answer>"]) == [{name: 1.0}]


def test_token_ids_go_to_functions_that_name_them():
    def counts(completion_ids, **columns):
        return [len(ids) for ids in completion_ids]

    assert score(rewarder(counts), TEXT, ["a", "bcd"]) == [{"mine": 1.0}, {"mine": 3.0}]
    built = build_rewarder([{"_component_": f"{R}.overlong", "max_tokens": 4, "buffer": 2}])
    assert score(built, CHAT, ["ab", "abc", "abcd"]) == [{"overlong": 0.0}, {"overlong": -0.5}, {"overlong": -1.0}]
    with pytest.raises(ConfigError, match="no argument 'completion_ids'"):
        build_rewarder([{"_component_": f"{R}.overlong", "max_tokens": 4, "buffer": 2, "completion_ids": []}])


@pytest.mark.parametrize("scores", [np.array([1, 0.5]), torch.tensor([1, 0.5]), (1, 0.5), [torch.tensor(1.0), 0.5]])
def test_arrays_and_tensors_are_scores(scores):
    assert score(rewarder(lambda **_: scores), TEXT, ["a", "b"]) == [{"mine": 1.0}, {"mine": 0.5}]


def test_none_counts_as_zero_beside_another_functions_score():
    both = FunctionRewarder((("mine", lambda **_: [None, None], 1.0), ("other", lambda **_: [None, 1], 1.0)))
    assert score(both, TEXT, ["a", "b"]) == [
        FailedReward("mine, other", "returned None"),
        {"mine": 0.0, "other": 1.0},
    ]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([1.0], "returned 1 scores for 2"),
        ([1.0, math.nan], "returned nan"),
        ([1.0, math.inf], "returned inf"),
        ([1.0, "good"], "returned 'good'"),
        (1.0, "returned a float"),
        (None, "returned a NoneType"),
    ],
)
def test_a_bad_result_names_the_function(result, reason: str):
    first, second = score(rewarder(lambda **_: result), TEXT, ["a", "b"])
    assert isinstance(second, FailedReward) and second.name == "mine" and second.reason.startswith(reason)
    alone = isinstance(result, list) and len(result) == 2
    assert first == ({"mine": 1.0} if alone else second)


def test_an_exception_names_the_function():
    def mine(prompts, completions, solution, **columns):
        raise AssertionError

    (failed,) = score(rewarder(mine), TEXT, ["a"])
    assert isinstance(failed, FailedReward) and "raised TypeError: " in failed.reason and "solution" in failed.reason
    assert score(rewarder(lambda **_: 1 / 0), TEXT, ["a"]) == [
        FailedReward("mine", "raised ZeroDivisionError: division by zero")
    ]


def test_build_binds_arguments_weighs_and_keeps_the_order():
    built = build_rewarder(
        [
            {"_component_": f"{R}.answer_tag"},
            {"_component_": f"{R}.length", "target": 20, "weight": 0.1},
            {"_component_": f"{R}.length", "target": 5, "weight": -1, "name": "terse"},
        ]
    )
    parts = score(built, TEXT, ["<answer>2</answer>"])[0]
    assert list(parts.items()) == [("answer_tag", 1.0), ("length", 1.0), ("terse", 0.0)]
    assert built.total(parts) == pytest.approx(1.1)


def test_a_bound_argument_hides_the_column_of_its_name():
    built = build_rewarder([{"_component_": f"{R}.length", "target": 4}])
    prompt = Prompt(0, (1,), "q", {"target": "a column"})
    assert score(built, prompt, ["xxxxxx"]) == [{"length": 0.5}]


def test_a_users_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_rewards_of_test.py").write_text(
        "def short(completions, **kw): return [len(c) for c in completions]"
    )
    monkeypatch.chdir(tmp_path)
    assert score(build_rewarder([{"_component_": "my_rewards_of_test.short"}]), TEXT, ["abc"]) == [{"short": 3.0}]


@pytest.mark.parametrize(
    ("components", "reason"),
    [
        ([], "at least one"),
        ([{"weight": 1}], "lacks _component_"),
        ([{"_component_": f"{R}.answer_tga"}], "answer_tag"),
        ([{"_component_": f"{R}.length", "targte": 3}], "no argument 'targte'; the nearest is target"),
        ([{"_component_": f"{R}.format", "weight": "much"}], "weight .* 'much'"),
        ([{"_component_": f"{R}.format"}, {"_component_": f"{R}.format"}], "format is used 2 times"),
    ],
)
def test_build_refuses(components: list[dict], reason: str):
    with pytest.raises(ConfigError, match=reason):
        build_rewarder(components)


@pytest.mark.parametrize("library", [pickle, cloudpickle])
def test_a_rewarder_can_be_pickled(library):
    built = build_rewarder([{"_component_": f"{R}.length", "target": 5}, {"_component_": f"{R}.math_answer"}])
    copy = pickle.loads(library.dumps(built))
    assert score(copy, TEXT, [r"\boxed{2}"]) == score(built, TEXT, [r"\boxed{2}"])
