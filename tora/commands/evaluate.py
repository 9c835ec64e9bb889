"""`tora eval`: score a run, an adapter or a model on a dataset."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tora.errors import ConfigError

if TYPE_CHECKING:
    from tora.reporting.evaluation import EvalResult, Passes
    from tora.run.target import Target

_ALL = 1 << 31
_EPILOG = """examples:
  tora eval outputs/quickstart --samples 8
  tora eval outputs/quickstart --checkpoint 60 --greedy
  tora eval outputs/quickstart/adapter --dataset test.jsonl --engine torch
  tora eval Qwen/Qwen3-0.6B --config qwen3/0.6B_lora_grpo_single_device --num-prompts 200
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="score a run, an adapter or a model",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="RUN|ADAPTER|MODEL", help="a run's folder, a PEFT folder, or a model")
    parser.add_argument("--checkpoint", metavar="N|best", help="of a run: a checkpoint's step, or the best policy")
    parser.add_argument("--config", metavar="CONFIG", help="where dataset and rewards of an adapter or a model are")
    parser.add_argument("--dataset", metavar="FILE|NAME", help="a file, a hub name, or the dotted path of a task")
    parser.add_argument("--split", metavar="SPLIT", help="of --dataset")
    parser.add_argument("--reward", metavar="PATH", action="append", help="dotted path of a reward, in place of theirs")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="the first N (default: the config's, or all)")
    parser.add_argument("--samples", type=int, metavar="N", help="rollouts per prompt (default: the config's, or 1)")
    parser.add_argument("--greedy", action="store_true", help="temperature 0, one rollout per prompt")
    parser.add_argument("--pass-at-least", type=float, metavar="X", help="a rollout passes if its reward is at least X")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), help="what generates (default: auto)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the tables (default: evals/NAME)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the config")
    parser.set_defaults(command=command)


@dataclass(frozen=True, slots=True)
class Report:
    """What an evaluation found."""

    target: Target
    result: EvalResult
    intervals: dict[str, tuple[float, float]]
    """95% intervals over prompts, by the name of the mean."""
    folder: Path
    samples: int


def command(args: argparse.Namespace) -> int:
    from tora.reporting.strict_json import to_json

    report = evaluate(args, is_quiet=args.json)
    if args.json:
        print(to_json(document(report), indent=2))
    else:
        _print(report)
    return 0


def evaluate(args: argparse.Namespace, *, is_quiet: bool = True) -> Report:
    """Generate, score and write the tables. Raises ConfigError for a wrong argument."""
    from tora.launch.policies import answers, serving
    from tora.reporting.completions import evaluated_rows, prompt_rows, write_parquet
    from tora.reporting.evaluation import mean_intervals, summarize
    from tora.run.target import find

    if args.greedy and (args.samples or 1) > 1:
        raise ConfigError(f"--greedy gives the same rollout every time; leave out --samples={args.samples}.")
    for name in ("samples", "num_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be at least 1.")
    target = find(
        args.target, args.overrides, checkpoint=args.checkpoint, config=args.config, tree=_rewards(args.reward)
    )
    target = _with_prompts(target, args)
    passes = _passes(target, args.pass_at_least)
    folder = _free(args.out) if args.out else _numbered(Path("evals") / target.label)
    with serving(target) as (worker, prompts):
        if not prompts.held_out:
            raise ConfigError("the dataset has no prompt that fits.")
        show = None if is_quiet or not sys.stderr.isatty() else len(prompts.held_out)
        groups = answers(worker, prompts.held_out, lambda done: _progress(done, show))
    assert target.cfg.eval is not None
    samples = target.cfg.eval.samples
    result = summarize(groups, samples, passes)
    write_parquet(evaluated_rows(groups, samples, passes), folder / "completions.parquet")
    write_parquet(prompt_rows(groups, samples, passes), folder / "prompts.parquet")
    report = Report(target, result, mean_intervals(groups, samples, passes), folder, samples)
    from tora.reporting.strict_json import to_json

    (folder / "result.json").write_text(to_json(document(report), indent=2) + "\n")
    return report


def document(report: Report) -> dict[str, Any]:
    """The result as JSON has it."""
    result = report.result
    return {
        "target": report.target.label,
        "step": report.target.step,
        "num_prompts": result.num_prompts,
        "samples": report.samples,
        "reward": result.reward,
        "accuracy": result.accuracy,
        **{f"pass@{k}": value for k, value in result.pass_at.items()},
        "length_mean": result.length,
        "truncated_share": result.truncated,
        "intervals": {name: list(ends) for name, ends in report.intervals.items()},
        "completions": str(report.folder / "completions.parquet"),
        "prompts": str(report.folder / "prompts.parquet"),
    }


def _rewards(paths: Sequence[str] | None) -> dict[str, Any]:
    return {"rewards": [{"_component_": path} for path in paths]} if paths else {}


def _with_prompts(target: Target, args: argparse.Namespace) -> Target:
    """The target with the section `eval` that the arguments ask for, and nothing to train on."""
    from dataclasses import replace

    from tora.config.components import check_component
    from tora.config.schema import EvalConfig

    cfg, given = target.cfg, args.dataset is not None
    own = cfg.eval
    if not given and own is None:
        raise ConfigError(f"{args.target} has no held-out set; name one with --dataset.")
    if (args.config is None and target.run is None) and not args.reward:
        raise ConfigError(f"{args.target} is no run, so its rewards are not known; name a --config or a --reward.")
    dataset = _dataset(args.dataset, args.split) if given else own.dataset  # type: ignore[union-attr]
    check_component(dataset, "--dataset")
    section = own or EvalConfig(dataset=dataset)
    section = replace(
        section,
        dataset=dataset,
        more={},
        num_prompts=args.num_prompts or (_ALL if given or own is None else section.num_prompts),
        samples=1 if args.greedy else args.samples or section.samples,
        temperature=0.0 if args.greedy else section.temperature,
    )
    rollout = replace(cfg.rollout, engine=args.engine or "auto")
    return replace(target, cfg=replace(cfg, eval=section, dataset=dataset, rollout=rollout))


def _dataset(name: str, split: str | None) -> dict[str, Any]:
    """A file, a task's dotted path, or a name on the hub."""
    splits = {} if split is None else {"split": split}
    path = Path(name).expanduser()
    if path.exists() or path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
        return {"_component_": "tora.tasks.dataset.file_dataset", "path": str(path), **splits}
    if "/" in name:
        return {"_component_": "tora.tasks.dataset.hub_dataset", "name": name, **splits}
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        return {"_component_": name, **splits}
    raise ConfigError(f"--dataset={name} is no file, no name on the hub (owner/name) and no dotted path of a task.")


def _passes(target: Target, at_least: float | None) -> Passes | None:
    from tora.reporting.evaluation import passes_by
    from tora.rewards.accuracy import accuracy_reward

    if at_least is None:
        return passes_by(accuracy_reward(target.cfg.rewards))
    if not math.isfinite(at_least):
        raise ConfigError(f"--pass-at-least={at_least} must be a finite number.")
    return lambda rollout: rollout.reward >= at_least


def _numbered(folder: Path) -> Path:
    """`folder`, or the first of `folder.1`, `folder.2`, ... that does not exist, so that no result is lost."""
    number, free = 0, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}.{number}")
    return free


def _free(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out={folder} is not empty; choose another folder.")
    return folder


def _progress(done: int, total: int | None) -> None:
    if total is not None:
        print(f"\r{done}/{total} prompts", end="\n" if done >= total else "", file=sys.stderr, flush=True)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    result, target = report.result, report.target
    step = "" if target.step is None else f", step {target.step}"
    each = "one rollout each" if report.samples == 1 else f"{report.samples} rollouts each"
    print(f"{target.label}{step}: {result.num_prompts} prompts, {each}")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in [("reward", result.reward), *((f"pass@{k}", v) for k, v in _pass_at(result).items())]:
        ends = report.intervals.get(name)
        table.add_row(name, f"{value:.3f}" + (f"   95% interval {ends[0]:.3f} to {ends[1]:.3f}" if ends else ""))
    table.add_row("length", f"{result.length:.1f} tokens, {result.truncated:.1%} cut off")
    table.add_row("completions", Text(str(report.folder / "completions.parquet")))
    table.add_row("prompts", Text(str(report.folder / "prompts.parquet")))
    Console().print(table)
    if result.accuracy is None:
        print("no pass@k: none of the rewards declares an accuracy; say what passes with --pass-at-least X")


def _pass_at(result: EvalResult) -> dict[int, float]:
    return dict(result.pass_at) or ({} if result.accuracy is None else {1: result.accuracy})
