"""`tora completion SHELL`: a script that completes commands, configs and keys."""

from __future__ import annotations

import argparse
from typing import Any

_SHELLS = ("bash", "zsh", "fish")
_BASH = """\
_tora() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words="{commands}"
    # bash splits words at "=", so that what follows it is a word of its own, which has no completion
    [[ "$word" == "=" || ( $COMP_CWORD -gt 1 && "${{COMP_WORDS[COMP_CWORD-1]}}" == "=" ) ]] && return
    if [ "$COMP_CWORD" -gt 1 ]; then
        case "${{COMP_WORDS[1]}}" in
            run|validate) words="{configs} {keys}" ;;
            cp) words="{configs}" ;;
            help) words="{names}" ;;
            completion) words="{shells}" ;;
            *) words="" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [ "$COMP_CWORD" -gt 1 ] && [ "${{#COMPREPLY[@]}}" -eq 0 ]; then COMPREPLY=($(compgen -f -- "$word")); fi
    [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
}}
complete -o filenames -F _tora tora
"""
_FISH = """\
complete -c tora -f -n __fish_use_subcommand -a "{commands}"
complete -c tora -n "__fish_seen_subcommand_from run validate" -a "{configs} {keys}"
complete -c tora -n "__fish_seen_subcommand_from cp" -a "{configs}"
complete -c tora -f -n "__fish_seen_subcommand_from help" -a "{names}"
"""


def add_parser(commands: Any) -> None:
    completion = commands.add_parser(
        "completion", help="print a script that completes words in a shell", allow_abbrev=False
    )
    completion.add_argument("shell", choices=_SHELLS)
    completion.set_defaults(command=lambda args: command(args, [*commands.choices]))


def command(args: argparse.Namespace, commands: list[str]) -> int:
    print(script(args.shell, commands), end="")
    return 0


def script(shell: str, commands: list[str]) -> str:
    """`commands`: their names."""
    from tora.config.load import config_names
    from tora.config.reference import entries

    names = [entry.key for entry in entries()]
    words = {
        "commands": " ".join(commands),
        "configs": " ".join(config_names()),
        "keys": " ".join(f"{name}=" for name in names),
        "names": " ".join(names),
        "shells": " ".join(_SHELLS),
    }
    if shell == "fish":
        return _FISH.format(**words)
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return start + _BASH.format(**words)
