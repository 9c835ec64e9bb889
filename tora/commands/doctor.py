"""`tora doctor`: check this machine and suggest fixes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tora.commands.doctor_checks import Finding


def add_parser(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="check this machine and suggest fixes", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--parity", metavar="MODEL", help="compare vLLM with the learner on this model folder instead")
    doctor.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    if args.parity is None:
        return run(as_json=args.json)
    from tora.commands.parity import parity

    return parity(args.parity, as_json=args.json)


def run(*, as_json: bool) -> int:
    """Runs all checks side by side and prints their findings; returns 1 if there is a fault."""
    import json
    from concurrent.futures import ThreadPoolExecutor
    from dataclasses import asdict

    from tora.commands.doctor_checks import CHECKS

    with ThreadPoolExecutor(len(CHECKS)) as pool:
        findings = dict(zip(CHECKS, pool.map(lambda check: check(), CHECKS.values()), strict=True))
    if as_json:
        print(json.dumps({name: asdict(finding) for name, finding in findings.items()}, indent=2))
    else:
        _print(findings)
    return int(any(finding.status == "fault" for finding in findings.values()))


def _print(findings: dict[str, Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    width = max(map(len, findings))
    colour = {"ok": "green", "note": "yellow", "fault": "red"}
    for name, finding in findings.items():
        status = f"[{colour[finding.status]}]{finding.status:5}[/]"
        console.print(f"{status}  {name:{width}}  {escape(finding.detail)}")
        if finding.advice:
            console.print(f"{'':{width + 9}}[dim]{escape(finding.advice)}[/]")
