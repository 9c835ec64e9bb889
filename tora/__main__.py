"""The program `tora`, and `python -m tora`. Each rank of a run is started this way."""

import os
import sys
import traceback
from typing import NoReturn

# `python -m` puts the working directory first; a learner.py of the user's there must not hide a package of ours.
if sys.path and sys.path[0] in ("", os.getcwd()):
    sys.path.append(sys.path.pop(0))


def main() -> NoReturn:
    """A run listens to signals before it imports anything else."""
    stop = None
    if sys.argv[1:2] == ["run"]:
        from tora.launch.signals import Stop

        is_launched = "TORA_RUN_MARK" in os.environ and "RANK" in os.environ
        stop = Stop(speaks=not is_launched and os.environ.get("RANK", "0") == "0")
        stop.listen()
        if not is_launched:
            from tora.launch.leftovers import Leftovers

            stop.leftovers = Leftovers()
    from tora.cli import main as command_line

    if stop is None:
        sys.exit(command_line())
    code = 1
    try:
        code = command_line(stop=stop)
    except SystemExit as error:  # of argparse, and of torchtune's recipes
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    stop.exit(code)


if __name__ == "__main__":
    main()
