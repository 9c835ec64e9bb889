"""The check of a GPU's first hour, without a GPU: its plan, what it reads of real reports, and how it goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tora.bench import gpu_figures
from tora.bench.gpu_check import Run, check, main, print_report, run_program
from tora.bench.gpu_figures import Expected
from tora.bench.gpu_steps import Step, steps
from tora.bench.rows import Row, write_json
from tora.bench.shapes import shape_names
from tora.commands.parity_row import ParityRow
from tora.config.load import load_config
from tora.reporting.strict_json import to_json

ROOT = Path(__file__).resolve().parents[2]
H100, A100, OTHER = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"
SMI = "NVIDIA H100 80GB HBM3, {driver}, 81559 MiB, 9.0\nNVIDIA H100 80GB HBM3, {driver}, 81559 MiB, 9.0\n"


def plan(folder: Path) -> list[Step]:
    return steps(folder, model="configs/bases/chain_sum", big_model="/models/Qwen3-8B")


def test_the_dry_run_prints_every_step_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for number, step in enumerate(plan(tmp_path), 1):
        assert f"{number}. {step.name}: {step.why}" in printed
        for figure in step.expected:
            assert f"   {figure}: " in printed
    assert "driver: 580 to 999; alarm below 580" in printed
    assert "lora, tok/s: 9000 to 13000 on an H100; alarm below 1000" in printed
    assert not list(tmp_path.iterdir())
    assert main(["--again", "nonsense"]) == 2 and "There is no step nonsense" in capsys.readouterr().out


def test_every_command_of_the_plan_is_one_that_works(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert len({step.name for step in made}) == len(made)
    for step in made:
        words = list(step.command)
        if "run" in words:
            config, *overrides = words[words.index("run") + 1 :]
            cfg = load_config(config, overrides)
            assert cfg.output_dir == str(tmp_path / step.name / "run")
            assert cfg.async_rl == (step.name in ("quickstart_async", "two_gpus_ray"))
        if "bench" in words:
            assert words[words.index("--config") + 1] in shape_names()
            assert words[words.index("--json") + 1] == str(tmp_path / step.name / "rows.json")
            asked = subprocess.run([*words[:3], "bench", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
            assert not [word for word in words if word.startswith("--") and word not in asked]
        if "pytest" in words:
            assert (ROOT / words[-1]).is_dir()
    (two,) = [step for step in made if step.name == "two_gpus_torchrun"]
    assert two.command[1:8] == ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tora")


def test_figures_are_read_from_what_the_programs_write(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text(SMI.format(driver="580.65.06"))
    found = gpu_figures.driver(tmp_path)
    assert found == {
        "GPUs": 2,
        "driver": 580,
        "compute capability": 9,
        "GPU memory, GiB": pytest.approx(79.65, abs=0.1),
    }
    assert gpu_figures.card(tmp_path) == H100 and gpu_figures.card(tmp_path / "nothing") == ""

    rows = [
        ParityRow("lora", dtype, 0.01, 1, gap, 1, 0.01, 1, 3.0, 0.02, 512)
        for dtype, gap in (("fp32", 0), ("bf16", 0.02))
    ]
    text = to_json([{**asdict(row), **row.bounds, "holds": row.holds} for row in rows], indent=2)
    (tmp_path / "output.log").write_text(f"[warning] before\n{text}\n[rank0] after]\n")
    assert gpu_figures.parity(tmp_path) == {
        "bf16 mean gap, nat": 0.02,
        "rows that hold": sum(r.holds for r in rows) / 2,
    }

    write_json(
        [
            Row("lora", False, False, 0.8),
            Row("dora_cache", False, False, 0.9, ratio_to_lora=1.12),
            Row("lora", True, True, 1.0, ratio_to_unquantized=1.25),
            Row("full", False, True),
        ],
        tmp_path / "rows.json",
    )
    assert gpu_figures.learner(tmp_path) == {
        "lora, tok/s": 10240,
        "dora_cache, tok/s": pytest.approx(9102, abs=1),
        "dora_cache / lora": 1.12,
        "qlora compiled, tok/s": 8192,
        "qlora compiled / lora compiled": 1.25,
    }

    from tora.bench.sync import SpeedRow, SyncRow

    syncs = [
        SyncRow(update, "lora", 8, 87, 9, (2.0, 5.0), (1.0, 1.0), 250.0, 9000.0)
        for update in ("between_rollouts", "in_flight")
    ]
    write_json([*syncs, SpeedRow("lora", 8, 128, 9500.0, 0.8)], tmp_path / "rows.json")
    assert gpu_figures.sync(tmp_path) == {
        "lora install, ms": 250,
        "lora stall, ms": 2,
        "lora x128, tok/s": 9500,
        "lora x128 / base": 0.8,
    }


def metrics(folder: Path, *rows: dict[str, float]) -> None:
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))


def test_a_runs_figures_are_its_worst(tmp_path: Path) -> None:
    step = {"time/step_s": 2.0}
    metrics(
        tmp_path / "a",
        {**step, "time/step_s": 90.0},
        {**step, "mismatch_kl": 2e-4},
        {**step, "mismatch_kl": 1e-4, "canary/gap_max": 0.02},
    )
    metrics(tmp_path / "b", {**step, "canary/gap_max": 0.01}, {**step, "mismatch_kl": math.nan})
    assert gpu_figures.run(tmp_path / "a") == {"mismatch_kl": 2e-4, "canary/gap_max": 0.02, "s/step": 2.0}
    assert gpu_figures.run(tmp_path / "b")["mismatch_kl"] == math.inf, "NaN is worst"
    assert gpu_figures.graphs_against_eager(tmp_path / "a", tmp_path / "b") == {"canary gap, graphs / eager": 2}


@pytest.mark.parametrize(
    ("value", "card", "status"),
    [
        (10e3, H100, "ok"),
        (8e3, H100, "outside"),
        (500, H100, "alarm"),
        (3.8e3, A100, "ok"),
        (10e3, A100, "outside"),
        (2e3, OTHER, "ok"),
        (2e3, "", "ok"),
        (500, OTHER, "alarm"),
        (math.nan, OTHER, "alarm"),
        (math.inf, H100, "alarm"),
    ],
)
def test_a_value_is_judged_by_its_card(value: float, card: str, status: str) -> None:
    assert Expected(9e3, 11e3, kind="learner", alarm_below=1e3).judge(value, card) == status


class Machine:
    """Runs the programs of a plan: writes what each would, or fails it."""

    def __init__(self, *fail: str, driver: str = "580.65.06", kl: float = 1e-9) -> None:
        self.ran: list[str] = []
        self.fail, self.driver, self.kl = set(fail), driver, kl

    def __call__(self, command: Sequence[str], log: Path, seconds: float) -> int | None:
        folder = log.parent
        self.ran.append(folder.name)
        log.write_text(SMI.format(driver=self.driver) if folder.name == "driver" else "")
        if folder.name.startswith(("quickstart", "two_gpus")):
            metrics(folder, {"mismatch_kl": self.kl, "time/step_s": 1.0})
        return None if f"{folder.name} hangs" in self.fail else int(folder.name in self.fail)


def short_plan(folder: Path) -> list[Step]:
    names = ("driver", "doctor", "quickstart_torch", "real_graphs", "two_gpus_ray")
    made = [step for step in plan(folder) if step.name in names]
    return [*made, Step("four", ("four",), 1, "four GPUs", gpus=4)]


def do(folder: Path, machine: Run, again: Sequence[str] = ()) -> dict[str, str]:
    report = check(short_plan(folder), folder, run=machine, say=lambda line: None, again=again)
    assert json.loads((folder / "report.json").read_text())["steps"] == json.loads(to_json(report))
    return {name: record["status"] for name, record in report.items()}


def test_the_check_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = Machine("doctor", "two_gpus_ray hangs")
    assert do(tmp_path, first) == {
        "driver": "ok",
        "doctor": "failed",
        "quickstart_torch": "ok",
        "real_graphs": "left out",
        "two_gpus_ray": "failed",
        "four": "left out",
    }
    assert first.ran == ["driver", "doctor", "quickstart_torch", "two_gpus_ray"]
    notes = json.loads((tmp_path / "report.json").read_text())
    assert notes["card"] == H100
    assert "exit code 1" in notes["steps"]["doctor"]["notes"][0]
    assert "stopped after 20 minutes" in notes["steps"]["two_gpus_ray"]["notes"][0]
    assert notes["steps"]["four"]["notes"] == ["needs 4 GPUs, and there is 2"]
    second = Machine()
    assert do(tmp_path, second)["two_gpus_ray"] == "ok"
    assert second.ran == ["doctor", "two_gpus_ray"], "what failed, and nothing else"
    third = Machine(kl=0.1)
    assert do(tmp_path, third, again=["quickstart_torch"])["quickstart_torch"] == "alarm"
    assert third.ran == ["quickstart_torch"]
    (tmp_path / "report.json").write_text('{"steps": {"dri')  # a crash's
    fourth = Machine()
    do(tmp_path, fourth)
    assert len(fourth.ran) == 4


def test_an_old_driver_ends_it_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = Machine(driver="550.54.15")
    assert do(tmp_path, old) == {"driver": "alarm"} and old.ran == ["driver"]
    print_report(short_plan(tmp_path), json.loads((tmp_path / "report.json").read_text())["steps"])
    printed = capsys.readouterr().out
    assert "PyTorch's CUDA 13 needs driver 580" in printed and "not run" in printed


def test_a_figure_that_is_missing_is_an_alarm(tmp_path: Path) -> None:
    def silent(command: Sequence[str], log: Path, seconds: float) -> int:
        log.write_text("")
        metrics(log.parent, {"time/step_s": 1.0})
        return 0

    (step,) = [step for step in plan(tmp_path) if step.name == "quickstart_torch"]
    record = check([step], tmp_path, run=silent, say=lambda line: None)["quickstart_torch"]
    assert record["status"] == "alarm" and record["notes"] == ["mismatch_kl was not measured"]
    unread = Step("unread", ("x",), 1, "", read=gpu_figures.learner)
    record = check([unread], tmp_path, run=silent, say=lambda line: None)["unread"]
    assert record["status"] == "alarm" and "cannot be read: FileNotFoundError" in record["notes"][0]


def test_a_program_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    assert run_program([sys.executable, "-c", "print('x'); raise SystemExit(3)"], tmp_path / "log", 60) == 3
    assert (tmp_path / "log").read_text() == "x\n"
    assert run_program(["/no/such/program"], tmp_path / "log", 60) == 127
    sleeper = f"sleep 60 & echo $! > {tmp_path / 'pid'}; wait"
    assert run_program(["bash", "-c", sleeper], tmp_path / "log", 1.0) is None
    pid = (tmp_path / "pid").read_text().strip()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child is still running")
