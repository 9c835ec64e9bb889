"""A resume whose config differs from the run's: refused, reported or silent, as each key is marked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest

from tora.cli import main
from tora.config.load import dump_yaml, load_config, read_tree
from tora.config.marks import Resume
from tora.config.reference import entries
from tora.config.resuming import changes, check_resumed, marks
from tora.run.manifest import seal

BEFORE = ["quickstart", "async_rl=false", "rollout.engine=torch"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a run of `BEFORE` leaves, as far as a refusal reads it."""
    (tmp_path / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(load_config(BEFORE[0], BEFORE[1:])))
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "run" / "checkpoints" / "step_000002" / "run_state.json").write_text('{"step": 2}')
    seal(tmp_path / "run" / "checkpoints" / "step_000002")
    return tmp_path / "run"


def changed(folder: Path, *overrides: str) -> list[tuple[str, Any, Any]]:
    found = changes(read_tree(folder / "config.yaml"), load_config(BEFORE[0], [*BEFORE[1:], *overrides]))
    return [(change.key, change.before, change.now) for change in found]


def test_every_key_has_a_mark_and_those_of_the_policy_are_fixed() -> None:
    by_key = marks()
    assert by_key.keys() == {entry.key for entry in entries() if not entry.is_section}
    fixed = {key for key, mark in by_key.items() if mark is Resume.FIXED}
    names = ["path", "revision", "implementation", "lora_type", "train_vision", "lora_rank", "lora_alpha", "use_rslora"]
    assert fixed == {*(f"model.{name}" for name in names), "model.lora_targets", "model.quantize_base"}
    assert by_key["optimizer"] is Resume.FIXED_COMPONENT
    assert by_key["loss"] is by_key["temperature"] is Resume.APPLIED
    assert by_key["metric_logger"] is by_key["rollout.num_workers"] is by_key["checkpoint.keep"] is Resume.FREE


@dataclass
class Inner:
    own: Annotated[int, Resume.FIXED] = 0
    other: int = 0


@dataclass
class Outer:
    inner: Annotated[Inner, Resume.FREE]
    optional: Annotated[int, Resume.FIXED] | None = None
    unmarked: int = 0


def test_a_key_without_a_mark_has_its_sections_and_else_is_applied() -> None:
    assert marks(Outer) == {
        "inner.own": Resume.FIXED,
        "inner.other": Resume.FREE,
        "optional": Resume.FIXED,
        "unmarked": Resume.APPLIED,
    }


@pytest.mark.parametrize(
    ("override", "before", "now"),
    [
        ("model.lora_rank=2", "model.lora_rank=1", "model.lora_rank=2"),
        ("model.lora_alpha=320", "model.lora_alpha=32.0", "model.lora_alpha=320.0"),
        ("model.lora_type=dora", 'model.lora_type="lora"', 'model.lora_type="dora"'),
        ("model.lora_targets=[q_proj]", "model.lora_targets=", 'model.lora_targets=["q_proj"]'),
        ("model.quantize_base=true", "model.quantize_base=false", "model.quantize_base=true"),
        ("model.use_rslora=true", "model.use_rslora=false", "model.use_rslora=true"),
        ("model.path=bases/digits", "model.path=", "model.path="),
        (
            "optimizer={_component_: torch.optim.SGD, lr: 1e-3}",
            'optimizer._component_="torch.optim.AdamW"',
            'optimizer._component_="torch.optim.SGD"',
        ),
    ],
)
def test_another_policy_is_refused_with_both_values(
    run_folder: Path, capsys: pytest.CaptureFixture[str], override: str, before: str, now: str
) -> None:
    words = [*BEFORE, f"output_dir={run_folder}", "resume_from_checkpoint=true", override]
    config = (run_folder / "config.yaml").read_text()
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert "continues a run with" in said and before in said and f"not {now}" in said
    assert len(said.strip().splitlines()) == 1
    assert (run_folder / "config.yaml").read_text() == config, "nothing is written"


def test_what_is_applied_is_said(run_folder: Path) -> None:
    overrides = ["optimizer.lr=1e-9", "num_steps=7", "loss.kl_coeff=0.5", "temperature=0.7"]
    cfg = load_config(BEFORE[0], [*BEFORE[1:], *overrides])
    said = {str(change) for change in check_resumed(run_folder / "config.yaml", cfg)}
    assert "optimizer.lr 0.0006 -> 1e-09" in said
    assert {text.split()[0] for text in said} == {"num_steps", "temperature", "loss.kl_coeff", "optimizer.lr"}


def test_what_is_harmless_is_silent(run_folder: Path) -> None:
    overrides = ["checkpoint.every=3", "eval=null", "sync.canary_every=0", "num_threads=1", "learner_ranks=2", "name=x"]
    cfg = load_config(BEFORE[0], [*BEFORE[1:], *overrides, f"output_dir={run_folder}"])
    assert check_resumed(run_folder / "config.yaml", cfg) == []
    assert {key for key, _, _ in changed(run_folder, *overrides)} > {"checkpoint.every", "eval", "learner_ranks"}


def test_equal_values_written_otherwise_are_no_change(run_folder: Path, tmp_path: Path) -> None:
    cfg = load_config(BEFORE[0], BEFORE[1:])
    (tmp_path / "link").symlink_to(cfg.model.path)
    cfg = replace(cfg, model=replace(cfg.model, path=str(tmp_path / "link"), lora_alpha=32))
    assert check_resumed(run_folder / "config.yaml", cfg) == []


def test_a_key_that_the_run_did_not_know_is_not_compared(run_folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    lines = (run_folder / "config.yaml").read_text().splitlines(keepends=True)
    old.write_text("".join(line for line in lines if "lora_alpha" not in line) + "a_key_of_old: 1\n")
    cfg = load_config(BEFORE[0], [*BEFORE[1:], "model.lora_alpha=1"])
    assert check_resumed(old, cfg) == []
    assert check_resumed(tmp_path / "none.yaml", cfg) == []
