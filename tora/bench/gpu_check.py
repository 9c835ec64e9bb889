"""The first hour with a GPU as one command: `deploy/gpu_check.sh`. Proves that Tora works on it, and measures it.

    ./deploy/gpu_check.sh [--dry-run] [--model FOLDER] [--big-model FOLDER] [--only STEP] [--again STEP] [--fresh]

Each step is a program of its own, with what it should measure and from where on that is an alarm. A step that was fine
is not run again, so after an interruption, or a cure, the same command continues. Writes `report.json` after each step.
Exits with 0 if no step failed and no figure is an alarm.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tora.bench import gpu_figures
from tora.bench.gpu_steps import Step, steps
from tora.reporting.strict_json import to_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("outputs", "gpu_check")
Record = dict[str, Any]
"""A step's `status` (ok, outside, alarm, failed), `seconds`, `figures` and `notes`."""
Run = Callable[[Sequence[str], Path, float], int | None]
"""Runs a command with its output in a file; its exit code, or None if it was stopped after so many seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--model", default=str(ROOT / "configs/bases/chain_sum"), help="model folder for parity")
    parser.add_argument("--big-model", help="folder of Qwen3-8B, for three real steps")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="run just this step; may repeat")
    parser.add_argument("--again", action="append", default=[], metavar="STEP", help="run this step again")
    parser.add_argument("--fresh", action="store_true", help="forget the steps that were fine")
    args = parser.parse_args(argv)
    plan = steps(FOLDER.absolute(), model=args.model, big_model=args.big_model)
    if unknown := {*args.again, *args.only} - {step.name for step in plan}:
        print(f"There is no step {min(unknown)}; the steps are {', '.join(step.name for step in plan)}.")
        return 2
    plan = [step for step in plan if not args.only or step.name in args.only]
    if args.dry_run:
        print_plan(plan)
        return 0
    if args.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    report = check(plan, FOLDER, again=args.again, given=["--big-model"] if args.big_model else [])
    print_report(plan, report)
    return 1 if any(record["status"] in ("failed", "alarm") for record in report.values()) else 0


def check(
    plan: Sequence[Step],
    folder: Path,
    *,
    again: Sequence[str] = (),
    given: Sequence[str] = (),
    run: Run | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[str, Record]:
    """Run the steps that are not done, and write `report.json` after each; the records by step.

    Without a usable driver nothing else runs. Other steps run whatever became of those before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = _read_report(folder)
    for step in plan:
        done = report.get(step.name, {}).get("status") in ("ok", "outside")
        if done and step.name not in again:
            say(f"{step.name}: done before")
            continue
        if reason := _left_out(step, report, given):
            report[step.name] = {"status": "left out", "notes": [reason]}
        else:
            say(f"{step.name}: {step.why} ...")
            report[step.name] = _do(step, folder / step.name, run or run_program, gpu_figures.card(folder / "driver"))
            say(f"{step.name}: {report[step.name]['status']}")
        _write(
            folder / "report.json", to_json({"card": gpu_figures.card(folder / "driver"), "steps": report}, indent=2)
        )
        if step.name == "driver" and report[step.name]["status"] in ("failed", "alarm"):
            break
    return {step.name: report[step.name] for step in plan if step.name in report}


def _left_out(step: Step, report: Mapping[str, Record], given: Sequence[str]) -> str:
    """Why a step is not run; empty if it is."""
    if step.needs and step.needs not in given:
        return f"needs {step.needs}"
    found = report.get("driver", {}).get("figures", {}).get("GPUs", 1)
    return f"needs {step.gpus} GPUs, and there is {found:.0f}" if step.gpus > found else ""


def _do(step: Step, folder: Path, run: Run, card: str) -> Record:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    code = run(step.command, folder / "output.log", 60.0 * step.minutes)
    record: Record = {"status": "ok", "seconds": round(time.monotonic() - start, 1), "figures": {}, "notes": []}
    if code != 0:
        stopped = f"stopped after {step.minutes} minutes" if code is None else f"exit code {code}"
        return {**record, "status": "failed", "notes": [f"{stopped}: see {folder / 'output.log'}"]}
    try:
        record["figures"] = dict(step.read(folder))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return {**record, "status": "alarm", "notes": [f"its figures cannot be read: {type(error).__name__}: {error}"]}
    card = card or gpu_figures.card(folder)  # the driver's own step names it
    for name, expected in step.expected.items():
        if name not in record["figures"]:
            record["status"] = "alarm"
            record["notes"].append(f"{name} was not measured")
            continue
        status = expected.judge(record["figures"][name], card)
        if status == "alarm":
            record["notes"].append(f"{name}: {expected.meaning or 'not what this step can measure when all is well'}")
        if status == "alarm" or (status == "outside" and record["status"] == "ok"):
            record["status"] = status
    return record


def run_program(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """See `Run`. A command that is stopped is stopped with all that it started."""
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            file.write(f"{command[0]} does not start: {error}\n".encode())
            return 127
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def _read_report(folder: Path) -> dict[str, Record]:
    """Empty if there is none, or a crash cut it off."""
    try:
        return json.loads((folder / "report.json").read_text())["steps"]
    except (OSError, ValueError, KeyError):
        return {}


def _write(file: Path, text: str) -> None:
    """A crash leaves the old file or the new one."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def print_plan(plan: Sequence[Step]) -> None:
    for number, step in enumerate(plan, 1):
        needs = [f"{step.gpus} GPUs"] if step.gpus > 1 else []
        needs += [step.needs] if step.needs else []
        print(f"{number}. {step.name}: {step.why}" + (f" (needs {', '.join(needs)})" if needs else ""))
        print(f"   $ {shlex.join(step.command)}")
        print(f"   at most {step.minutes} min")
        for name, expected in step.expected.items():
            print(f"   {name}: {_range(expected)}")


def _range(expected: gpu_figures.Expected) -> str:
    card = "" if expected.kind == "any" else " on an H100"
    alarms = [f"below {expected.alarm_below:g}"] if expected.alarm_below > -1e300 else []
    alarms += [f"above {expected.alarm_above:g}"] if expected.alarm_above < 1e300 else []
    alarm = f"; alarm {' or '.join(alarms)}" if alarms else ""
    return f"{expected.low:g} to {expected.high:g}{card}{alarm}"


def print_report(plan: Sequence[Step], report: Mapping[str, Record]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "status", "s", "figure", "value", "expected")
    for step in plan:
        record = report.get(step.name, {"status": "not run"})
        figures: Mapping[str, float] = record.get("figures", {})
        rows = [
            (name, f"{value:.4g}", _range(step.expected[name]) if name in step.expected else "")
            for name, value in figures.items()
        ]
        first, *others = rows or [("", "", "")]
        table.add_row(step.name, record["status"], f"{record.get('seconds', 0):.0f}", *first)
        for row in others:
            table.add_row("", "", "", *row)
    Console(width=140, highlight=False).print(table)
    for step in plan:
        for note in report.get(step.name, {}).get("notes", []):
            print(f"{step.name}: {note}")


if __name__ == "__main__":
    sys.exit(main())
