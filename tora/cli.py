"""The command line. `tora` and `tune` are one program, which keeps torchtune's own recipes and commands.

Commands import heavy packages when they need them, so that help texts and mistakes are answered at once. Exit codes: 2
for wrong input and 1 for a failed run, both with one sentence on stderr; 130 for a run that a signal ended.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Sequence

from tora.commands import bench, completion, configs, doctor, evaluate, export, help, plan, report, run, torchtune
from tora.commands.recipes import RECIPES, program
from tora.errors import ConfigError, ToraError
from tora.launch.signals import STOPPED, Stop

_EXAMPLES = """\
examples:
  {0} ls                                        what there is to run
  {0} run quickstart async_rl=false             train a tiny model in this process
  {0} cp qwen3/0.6B_lora_grpo_single_device mine.yaml
  {0} validate --deep mine.yaml                 check it, with model, data and rewards
  {0} run mine.yaml optimizer.lr=1e-5
  {0} help rollout.engine                       what a key means
"""


def main(argv: Sequence[str] | None = None, stop: Stop | None = None) -> int:
    """Run one command and return its exit code. `stop`: what listens to this process's signals, if anything does."""
    if argv is None and stop is None and sys.argv[1:2] == ["run"]:
        runpy.run_module("tora", run_name="__main__")  # the script of an editable install may be older, and call this
    argv = sys.argv[1:] if argv is None else list(argv)
    shows_traceback = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    try:
        code = _answer(argv, stop)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as in `tora ls | head -1`; what is left in the buffer must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ToraError as error:
        if shows_traceback:
            traceback.print_exception(error)
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return STOPPED


def _answer(argv: list[str], stop: Stop | None) -> int:
    argv = with_config_as_word(argv)
    if torchtune.is_torchtunes(argv):
        torchtune.delegate(argv)
        return 0
    args = _parse(argv)
    args.stop = stop
    return args.command(args)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program(),
        description="Post-train language and vision-language models with GRPO.",
        epilog=_EXAMPLES.format(program()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=_version())
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake too")
    parser.set_defaults(command=lambda args: parser.print_help() or 0)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run.add_parser(commands)
    evaluate.add_parser(commands)
    export.add_parser(commands)
    report.add_parsers(commands)
    configs.add_parsers(commands)
    plan.add_parser(commands)
    help.add_parser(commands)
    bench.add_parser(commands)
    doctor.add_parser(commands)
    completion.add_parser(commands)
    commands.add_parser("download", help="download a model (torchtune's command)")
    commands.add_parser("cat", help="print a torchtune config (torchtune's command)")

    args, rest = parser.parse_known_args(argv)
    if rest:
        # argparse does not match overrides that follow an option, as in `run RECIPE --config CONFIG key=value`
        if not hasattr(args, "overrides") or any(word.startswith("-") for word in rest):
            _refuse_options(rest, hasattr(args, "overrides") or args.command is configs.validate_command)
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    return args


def with_config_as_word(argv: Sequence[str]) -> list[str]:
    """`run --config CONFIG` without a recipe as `run CONFIG`, which torchtune's users write."""
    match argv:
        case ["run", "--config", config, *rest] if not any(word in RECIPES for word in rest):
            return ["run", config, *rest]
    return list(argv)


def _refuse_options(words: Sequence[str], takes_keys: bool) -> None:
    """Raises ConfigError for keys that are written as options, as in `--num_steps 3` or `--num_steps=3`."""
    if not takes_keys:
        return
    for i, word in enumerate(words):
        key, sign, value = word.lstrip("-").partition("=")
        if word.startswith("--") and key.replace(".", "").isidentifier():
            value = value if sign else next((w for w in words[i + 1 : i + 2] if not w.startswith("-")), "VALUE")
            raise ConfigError(f"There is no option --{key}; write keys of the config as {key}={value}.")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"tora {version('tora-rl')}"
    except PackageNotFoundError:
        return "tora, from a checkout that is not installed"
