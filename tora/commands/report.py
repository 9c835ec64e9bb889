"""`tora report` and `tora compare`: runs as an HTML page that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tora.errors import ConfigError


def add_parsers(commands: Any) -> None:
    one = commands.add_parser("report", help="write a run's report, one HTML page", allow_abbrev=False)
    one.add_argument("run", type=Path, metavar="RUN", help="a run's folder, also of a run under way")
    one.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run's folder")
    one.set_defaults(command=_report)
    many = commands.add_parser("compare", help="overlay the curves of several runs", allow_abbrev=False)
    many.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of two runs or more")
    many.add_argument("--out", type=Path, metavar="FILE", default=Path("compare.html"), help="default: compare.html")
    many.set_defaults(command=_compare)


def _report(args: argparse.Namespace) -> int:
    from tora.reporting.page import report

    return _write(args.out or args.run / "report.html", report(args.run))


def _compare(args: argparse.Namespace) -> int:
    from tora.reporting.page import compare

    if len(args.runs) < 2:
        raise ConfigError("compare needs two runs or more; `tora report` is for one.")
    return _write(args.out, compare(args.runs))


def _write(file: Path, text: str) -> int:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}.") from error
    print(file)
    return 0
