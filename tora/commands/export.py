"""`tora export`: a run's policy as a PEFT adapter or a merged model, with a model card, on disk or on the hub."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tora.errors import ConfigError

if TYPE_CHECKING:
    from tora.adapters.merge import MergeReport

_EPILOG = """examples:
  tora export outputs/quickstart --merge
  tora export outputs/quickstart --checkpoint 60 --to my_adapter
  tora export outputs/quickstart --merge --push me/my-model
"""
_LARGE = 0.1
"""Share of the adapter's update from which its rounding is worth a warning."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a run's adapter or merged model, or push it to the hub",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="RUN|ADAPTER", help="a run's folder, or a PEFT folder")
    parser.add_argument("--checkpoint", metavar="N|best", help="a checkpoint's step, or the best policy")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base: a whole model")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of a merged model (default: the base's)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="new folder (default: RUN/exports/NAME)")
    parser.add_argument("--push", metavar="REPO", help="upload to this repository on the hub, such as owner/name")
    parser.add_argument("--private", action="store_true", help="with --push: make a private repository")
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    from tora.config.hub_names import check_repo
    from tora.reporting.hub import HubRepo
    from tora.run.target import find

    if args.dtype and not args.merge:
        raise ConfigError(f"--dtype={args.dtype} needs --merge: an adapter stays in float32.")
    if args.private and not args.push:
        raise ConfigError("--private needs --push REPO.")
    if args.push:
        check_repo(args.push, "--push")
    target = find(args.target, checkpoint=args.checkpoint)
    if target.run is None and target.cfg.model.adapter_path is None:  # a base as it is
        raise ConfigError(f"{args.target} is a model that was not trained here, so there is nothing to export.")
    if args.merge and _kind(target) == "model":
        raise ConfigError(f"{args.target} trains all weights, so there is no adapter to merge; leave out --merge.")
    kind = "merged" if args.merge else _kind(target)
    folder = _new_folder(args.to, (target.run or Path(args.target)) / "exports" / f"{target.label}-{kind}")
    repo = HubRepo(args.push, private=args.private) if args.push else None  # refused before the work, not after it
    export_to(target, folder, kind, args.dtype)
    print(f"{kind}  {folder}")
    if repo is not None:
        repo.upload(folder, f"Upload {target.label}")
        print(f"pushed  {repo.url}")
    return 0


def export_to(target: Any, folder: Path, kind: str, dtype: str | None = None) -> None:
    """Write the policy and its card into the new folder; nothing is left of it if that fails."""
    from tora.launch.policies import export, export_merged
    from tora.reporting.model_card import write_model_card

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    try:
        if kind == "merged":
            from learner.policy import DTYPES

            report = export_merged(target, partial, DTYPES[dtype] if dtype else None)
            notes = _notes(report, target.cfg.model.quantize_base)
        else:
            export(target, partial)
            notes = [_NF4] if target.cfg.model.quantize_base else []
        card = target.trained or target.cfg
        write_model_card(partial, kind, card, run=target.run, step=target.step, notes=notes)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for note in notes:
        print(note)


_NF4 = (
    "The adapter was trained on the base in NF4. On the original weights it is a slightly different policy; merging it "
    "into the NF4 weights (`tora export --merge`) gives the policy that was trained."
)


def _notes(report: MergeReport, quantized: bool) -> list[str]:
    base = "the base's NF4 weights, as it was trained on them," if quantized else "the base"
    notes = [
        f"{report.num_modules} layers are merged into {base} in float32; rounding to the files' dtype moved them by "
        f"{report.rounding_share:.2%} of the adapter's own update."
    ]
    if report.rounding_share > _LARGE:
        notes.append("That is much: `--dtype fp32` keeps all of the update.")
    return notes


def _kind(target: Any) -> str:
    cfg = target.cfg
    return "model" if target.whole is not None or cfg.model.lora_type == "full" else "adapter"


def _new_folder(to: Path | None, default: Path) -> Path:
    """Raises ConfigError if it exists and is not empty."""
    folder = default if to is None else to.expanduser().absolute()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists():
        raise ConfigError(f"{folder} exists; name another folder with --to.")
    return folder
