"""`python -m tora`: the command line. torchrun starts each rank of a run this way."""

import os
import sys

from tora.cli import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:
    from tora.distributed.process_group import end_rank

    end_rank(code)
sys.exit(code)
