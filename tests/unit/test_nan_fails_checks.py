"""NaN fails every check that has a bound, wherever it stands."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparisons import compare, compare_metrics

from learner.loss import GRPOLoss
from tora.bench import simulate
from tora.bench.rows import Row, write_json
from tora.cli import main
from tora.commands.parity import ParityRow
from tora.errors import ConfigError
from tora.reporting.strict_json import to_json
from tora.run.canary import ProbeLogprobs, find_disagreement

NAN = math.nan


def scores(effect: float = 0.3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    off = rng.normal(-3, 1, 50)
    on = off + rng.normal(0, effect, 50)
    return {"learner_on": on, "learner_off": off, "engine_on": on, "engine_off": off}


def disagreement(s: dict[str, np.ndarray], max_gap: float, has_adapter: bool) -> str | None:
    learner = ProbeLogprobs(s["learner_on"], s["learner_off"] if has_adapter else None)
    return find_disagreement(learner, ProbeLogprobs(s["engine_on"], s["engine_off"] if has_adapter else None), max_gap)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("max_gap", [1e-4, 0.1])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["learner_on"],
        ["learner_off"],
        ["engine_on"],
        ["engine_off"],
        ["learner_on", "engine_on"],
        ["learner_off", "engine_off"],
        ["learner_on", "learner_off", "engine_on", "engine_off"],
    ],
)
def test_the_canary(names: list[str], max_gap: float, everywhere: bool, value: float) -> None:
    good = scores()
    assert disagreement(good, max_gap, True) is None and disagreement(good, max_gap, False) is None
    bad = {name: array.copy() for name, array in good.items()}
    for name in names:
        bad[name][slice(None) if everywhere else 7] = value
    with np.errstate(invalid="ignore"):  # inf - inf
        assert disagreement(bad, max_gap, True)
        assert bool(disagreement(bad, max_gap, False)) == any("on" in name for name in names)


def test_parity() -> None:
    good = ParityRow("lora", "bf16", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, effect=0.1, rounding=0.01, tokens=1)
    assert good.holds
    for name in ("sampled_mean", "on_mean", "off_mean", "effect", "rounding"):
        assert not replace(good, **{name: NAN}).holds, name


@pytest.mark.parametrize("name", ["gen_latency", "learn_latency", "jitter"])
@pytest.mark.parametrize("value", [NAN, math.inf, -1.0])
def test_the_arguments_of_the_simulation(name: str, value: float) -> None:
    good = {"actors": 1, "steps": 1, "staleness": 0, "gen_latency": 0.0, "learn_latency": 0.0, "jitter": 0.0}
    with pytest.raises(ConfigError, match="must be"):
        simulate.run(argparse.Namespace(**{**good, name: value}, json=None))


def test_the_comparisons_of_tests() -> None:
    with pytest.raises(AssertionError):
        compare({"a": torch.tensor([NAN])}, {"a": torch.tensor([NAN])})
    with pytest.raises(AssertionError):
        compare_metrics({"a": NAN}, {"a": NAN})


@pytest.mark.parametrize("key", ["clip_grad_norm", "optimizer.lr", "temperature", "sync.canary_max_gap"])
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_of_a_config(key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "quickstart", f"{key}={value}"]) == 2
    assert key in capsys.readouterr().err


@pytest.mark.parametrize("key", ["kl_coeff", "clip_low", "clip_high", "importance_high"])
def test_numbers_of_a_loss(key: str) -> None:
    for value in (NAN, math.inf):
        with pytest.raises(ConfigError, match=f"loss.{key}="):
            GRPOLoss(**{key: value})  # type: ignore[arg-type]


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_has_no_nan(tmp_path: Path) -> None:
    value = {"a": NAN, "b": [1.5, (math.inf, 2)], "c": {"d": -math.inf}, "e": "nan", "f": True, "g": None}
    expected = {"a": None, "b": [1.5, [None, 2]], "c": {"d": None}, "e": "nan", "f": True, "g": None}
    assert strict(to_json(value)) == strict(to_json(value, indent=2)) == expected
    row = Row("lora", False, False, seconds_per_step=NAN, seconds_spread=(0.5, math.inf))
    write_json([row], tmp_path / "rows.json")
    expected = {**asdict(row), "seconds_per_step": None, "seconds_spread": [0.5, None]}
    assert strict((tmp_path / "rows.json").read_text()) == [expected]
