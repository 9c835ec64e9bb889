"""The contract of a loss: what the learner reads from it, and what the config reads from its source."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

import learner.loss
from learner.loss.protocol import build_loss
from tora.config.components import class_literal
from tora.config.load import load_config
from tora.config.schema import RunConfig
from tora.errors import ConfigError

LISTED = {
    name: value
    for name, value in vars(learner.loss).items()
    if name.endswith("Loss") and dataclasses.is_dataclass(value)
}

MINE = """\
from dataclasses import dataclass

import torch

from learner.loss.objective import Terms, total


@dataclass(frozen=True)
class Reinforce(Terms):
    clip_low: float = 1.0
    clip_high: float = 1e9

    def __call__(self, x):
        objective_N = x.advantages_N * x.learner_logprobs_N
        return total(self, x, objective_N, torch.zeros_like(objective_N, dtype=torch.bool))


class Bare:
    kl_coeff = 0.0

    def __call__(self, x):
        return -(x.weights_N * x.advantages_N * x.learner_logprobs_N).sum(), {}


class NotCallable:
    kl_coeff, kl_type, kl_in, reference, proximal = 0.0, None, "loss", "initial", "learner"
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory."""
    (tmp_path / "losses_of_mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return "losses_of_mine"


@pytest.mark.parametrize("name", LISTED)
def test_the_source_says_what_the_class_requires(name: str) -> None:
    loss_class, settings = LISTED[name], dataclasses.fields(RunConfig)
    for path in (f"learner.loss.{name}", f"{loss_class.__module__}.{name}"):
        component = {"_component_": path}
        assert class_literal(component, "loss", "requires", default=None) == loss_class.requires
        assert build_loss(component) == loss_class()
    assert loss_class.requires.keys() <= {field.name for field in settings}
    assert "requires" not in inspect.signature(loss_class).parameters


def test_requirements_of_a_loss_cannot_be_set() -> None:
    with pytest.raises(ConfigError, match=r"loss.requires=1 is not an argument of learner.loss.GRPOLoss"):
        load_config("quickstart", ["loss.requires=1"])


def test_a_loss_is_refused_where_its_requirements_are_not_met() -> None:
    required = {name: value.requires for name, value in LISTED.items() if value.requires}
    assert len(required) == 5
    for name, keys in required.items():
        for key in keys:
            others = [f"{k}={str(v).lower()}" for k, v in keys.items() if k != key]
            wrong = {"token": "sequence", "sequence": "token", "constant": "token", False: "true"}[keys[key]]
            path = f"loss._component_=learner.loss.{name}"
            with pytest.raises(ConfigError, match=rf"{key}=.* must be .* with loss._component_=learner.loss.{name}"):
                load_config("quickstart", [path, f"{key}={wrong}", *others])
            right = str(keys[key]).lower()
            assert load_config("quickstart", [path, f"{key}={right}", *others]).loss["_component_"].endswith(name)


def test_a_loss_of_a_users_module_needs_no_declaration(mine: str) -> None:
    for normalization in ("token", "sequence", "constant"):
        overrides = [f"loss._component_={mine}.Reinforce", "loss.kl_coeff=0.1", f"loss_normalization={normalization}"]
        loss = build_loss(load_config("quickstart", overrides).loss)
        assert (loss.kl_coeff, loss.kl_type, loss.kl_in, loss.proximal) == (0.1, None, "loss", "learner")
        assert loss.reference == "initial"


def test_components_that_are_not_losses_are_refused(mine: str) -> None:
    with pytest.raises(ConfigError, match=rf"{mine}\.Bare lacks kl_type, kl_in, reference, proximal; .*documents what"):
        build_loss({"_component_": f"{mine}.Bare"})
    with pytest.raises(ConfigError, match=rf"{mine}\.NotCallable lacks __call__;"):
        build_loss({"_component_": f"{mine}.NotCallable"})
