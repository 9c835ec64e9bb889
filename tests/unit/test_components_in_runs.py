"""What a config names and a run calls, as it goes on: a mistake there is one sentence with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learners import config, make_batch, make_groups
from runs import read
from tiny import make_text_model

from learner.learner import Learner
from tora.cli import main
from tora.config.load import load_config
from tora.errors import ComponentError, ConfigError, portable
from tora.tasks.prompts import PromptStream
from tora.tasks.tokenizer import load_tokenizer

MINE = """\
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from learner.loss.objective import Terms


def broken_schedule(optimizer, late=2):
    return LambdaLR(optimizer, lambda step: 1 / (late - step))  # the line


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer)


def no_schedule(optimizer):
    return 3


class Optimizer(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("momentum")  # the line


def needs_closure(parameters, lr):
    return torch.optim.LBFGS(list(parameters), lr=lr)


def no_optimizer(parameters):
    return list(parameters)


class Loss(Terms):
    def __call__(self, x):
        return self.answer(x)

    @classmethod
    def of(cls, answer):
        return type(answer.__name__, (cls,), {"answer": staticmethod(answer)})


raising = Loss.of(lambda x: {}["kl"])  # the line
no_pair = Loss.of(lambda x: x.learner_logprobs_N.sum())
no_gradient = Loss.of(lambda x: (x.actor_logprobs_N.sum(), {}))
a_vector = Loss.of(lambda x: (x.learner_logprobs_N, {}))
nothing = Loss.of(lambda x: None)
vector_metric = Loss.of(lambda x: (x.learner_logprobs_N.sum(), {"a": x.weights_N}))
plain_numbers = Loss.of(lambda x: (-(x.weights_N * x.advantages_N * x.learner_logprobs_N).sum(), {"mine/one": 1.0}))


def differ(completions):
    return [float(i) for i, _ in enumerate(completions)]
"""

NOT_BUILT = [
    (
        "lr_scheduler",
        {"_component_": "mine_in_runs.plateau"},
        "step() is called without arguments, and it has a missing",
    ),
    ("lr_scheduler", {"_component_": "mine_in_runs.no_schedule"}, "makes a int, which lacks step, get_last_lr, "),
    ("optimizer", {"_component_": "mine_in_runs.no_optimizer"}, "makes a list, expected a torch.optim.Optimizer"),
]
IN_A_STEP = [
    ("lr_scheduler", "broken_schedule", "raised ZeroDivisionError: division by zero ({file}, line {line}: "),
    ("optimizer", "Optimizer", "raised KeyError: 'momentum' ({file}, line {line}: "),
    ("optimizer", "needs_closure", "raised TypeError: "),
    ("loss", "raising", "raised KeyError: 'kl' ({file}, line {line}: "),
    ("loss", "no_pair", "returned a tensor of shape [], expected a tensor of one number that carries a gradient, and"),
    ("loss", "no_gradient", "returned a tuple of a tensor of shape [] without a gradient, a dict, expected "),
    ("loss", "a_vector", "returned a tuple of a tensor of shape ["),
    ("loss", "nothing", "returned None, expected "),
    ("loss", "vector_metric", "returned a tuple of a tensor of shape [], a dict, expected "),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mine") / "mine_in_runs.py"
    file.write_text(MINE)
    return file


@pytest.fixture
def module(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module, importable; the working directory is another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(file.parent)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("key", "component", "words"), NOT_BUILT, ids=[c["_component_"] for _, c, _ in NOT_BUILT])
@pytest.mark.usefixtures("module")
def test_what_cannot_be_called_as_a_run_does_is_refused(model: Path, key: str, component: dict, words: str) -> None:
    cfg = config(model)
    setattr(cfg, key, component)
    with pytest.raises(ConfigError) as refused:
        Learner(cfg)
    assert words in str(refused.value) and str(refused.value).startswith(f"{key}: {component['_component_']}")


@pytest.mark.parametrize(("key", "name", "words"), IN_A_STEP, ids=[name for _, name, _ in IN_A_STEP])
def test_what_raises_in_a_step_is_named_with_file_and_line(
    model: Path, module: Path, key: str, name: str, words: str
) -> None:
    cfg, component = config(model), {"_component_": f"mine_in_runs.{name}"}
    setattr(cfg, key, {**component, "lr": 1e-3} if key == "optimizer" else component)
    learner, batch = Learner(cfg), make_batch(make_groups())
    with pytest.raises(ComponentError) as raised:
        for _ in range(2):
            learner.step(batch)
    marked = [i for i, line in enumerate(MINE.splitlines(), 1) if "# the line" in line]
    line = {"lr_scheduler": marked[0], "optimizer": marked[1], "loss": marked[2]}[key]
    message = str(raised.value)
    assert words.format(file=module, line=line) in message and message.startswith(f"{key}: mine_in_runs.{name} ")
    assert "\n" not in message and portable(raised.value) is raised.value, "it crosses processes as it is"


@pytest.mark.usefixtures("module")
def test_a_loss_may_report_plain_numbers(model: Path) -> None:
    learner = Learner(config(model, loss={"_component_": "mine_in_runs.plain_numbers"}))
    parts = len(make_batch(make_groups()).micro_batches)
    assert learner.step(make_batch(make_groups())).metrics["mine/one"] == parts


def test_lack_of_memory_is_not_the_components_fault() -> None:
    from tora.config.calls import call

    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), ConfigError("a")):

        def run_out(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            call({"_component_": "mine.f"}, "loss", run_out)
    with pytest.raises(KeyError):
        call({"_component_": "learner.loss.GRPOLoss"}, "loss", {}.__getitem__, "ours to mend")
    with pytest.raises(ComponentError, match=r"^loss: mine\.f raised KeyError: 'a'"):
        call({"_component_": "mine.f"}, "loss", {}.__getitem__, "a")


class Rows:
    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> object:
        if index == self.bad:
            raise PermissionError("pictures/3.png")
        return {"prompt": "1 + 2 =", "answer": "3"} if index < 2 else None


def test_a_row_that_raises_is_named_with_file_and_line() -> None:
    tokenizer = load_tokenizer(Path(load_config("quickstart").model.path))
    cases = {0: "mine.rows: its row 0", 1: "dataset row 1", 3: "dataset row 2 cannot be read: TypeError: "}
    for bad, words in cases.items():
        with pytest.raises(ConfigError) as raised:
            PromptStream(Rows(bad), tokenizer, 99, source="mine.rows").sequential(3)
        reason = f"PermissionError: pictures/3.png ({__file__}, line " if bad < 3 else ""
        assert words in str(raised.value) and reason in str(raised.value), bad


RUN = ["run", "quickstart", "async_rl=false", "rollout.engine=torch", "eval=null", "max_generated_tokens=8"]
RUN += [
    "rewards=[mine_in_runs.differ]",
    "batch_size=2",
    "grpo_samples=4",
    "sync.canary_every=0",
    "max_idle_steps=0",
    "rollout.max_refills=0",
]


def test_a_run_ends_with_the_sentence_and_the_newest_checkpoint(
    module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    component = "lr_scheduler={_component_: mine_in_runs.broken_schedule, late: 3}"
    words = [*RUN, component, "num_steps=9", "checkpoint.every=1", "output_dir=out"]
    assert main(["--debug", *words]) == 1
    traceback, error = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert "in step 3; resume_from_checkpoint=true continues from step_000002." in error and str(module) in error
    assert "Traceback" in traceback and len(read(tmp_path / "out")) == 2


def test_a_mistake_in_the_first_step_leaves_nothing(
    module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "loss={_component_: mine_in_runs.raising}", "num_steps=2", "output_dir=out"]) == 1
    error = capsys.readouterr().err
    assert "in step 1; no checkpoint yet." in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
