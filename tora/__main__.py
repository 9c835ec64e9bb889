"""`python -m tora`: the command line. torchrun starts each rank of a run this way."""

import os
import sys

# `python -m` puts the working directory first; a learner.py of the user's there must not hide a package of ours.
if sys.path and sys.path[0] in ("", os.getcwd()):
    sys.path.append(sys.path.pop(0))

from tora.cli import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:
    from tora.distributed.process_group import end_rank

    end_rank(code)
sys.exit(code)
