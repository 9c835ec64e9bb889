"""The command line. `tora` and `tune` are one program, which keeps torchtune's own recipes and commands.

Commands import heavy packages when they need them, so that help texts and mistakes are answered at once. Exit codes: 2
for wrong input and 1 for a failed run, both with one sentence on stderr; 130 for a run that a signal ended.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tora.commands import bench, configs, doctor, evaluate, export, help, plan, run, torchtune
from tora.commands.recipes import program
from tora.errors import ConfigError, ToraError
from tora.launch.signals import STOPPED, Stop


def main(argv: Sequence[str] | None = None, stop: Stop | None = None) -> int:
    """Run one command and return its exit code. `stop`: what listens to this process's signals, if anything does."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if torchtune.is_torchtunes(argv):
            torchtune.delegate(argv)
            return 0
        args = _parse(argv)
        args.stop = stop
        return args.command(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ToraError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return STOPPED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program(), description="Post-train language and vision-language models with GRPO.", allow_abbrev=False
    )
    parser.set_defaults(command=lambda args: parser.print_help() or 0)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run.add_parser(commands)
    evaluate.add_parser(commands)
    export.add_parser(commands)
    configs.add_parsers(commands)
    plan.add_parser(commands)
    help.add_parser(commands)
    bench.add_parser(commands)
    doctor.add_parser(commands)
    commands.add_parser("download", help="download a model (torchtune's command)")
    commands.add_parser("cat", help="print a torchtune config (torchtune's command)")

    args, rest = parser.parse_known_args(argv)
    if rest:
        # argparse does not match overrides that follow an option, as in `run RECIPE --config CONFIG key=value`
        if not hasattr(args, "overrides") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    return args
