"""A watchdog in a process of its own, which it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from learner.watchdog import Watchdog, size

_BEGIN = """
import re, sys, time
from pathlib import Path
from learner.watchdog import Watchdog
dog = Watchdog(float(sys.argv[2]), Path(sys.argv[1]))
def hangs():
    {how}
with dog.watching():
    for _ in range(6):
        time.sleep(0.3)
        dog.mark()
dog.mark()
time.sleep(1.5)
with dog.watching():
    hangs()
"""


@pytest.mark.parametrize("how", ["time.sleep(60)", "re.match('(a+)+$', 'a' * 60 + 'b')"])
def test_a_process_that_hangs_is_ended_and_leaves_its_stacks(how: str, tmp_path: Path) -> None:
    """Also where one call in C holds the interpreter lock. Progress, and calls that are over, do not count."""
    began, stacks = time.monotonic(), tmp_path / "stacks.txt"
    done = subprocess.run([sys.executable, "-c", _BEGIN.format(how=how), str(stacks), "1"], timeout=30, check=False)
    assert done.returncode == 1 and 4 < time.monotonic() - began < 15
    assert size(stacks) > 0 and "in hangs" in stacks.read_text()


@pytest.mark.parametrize("limit_s", [1e-9, 1e12, 1e300])
def test_any_limit_can_be_counted(limit_s: float) -> None:
    code = "from pathlib import Path; from learner.watchdog import Watchdog; import time\n"
    code += f"with Watchdog({limit_s}, Path('/dev/null/stacks')).watching(): time.sleep(0.5)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == (limit_s < 1)
    assert ("line 2 in <module>" in done.stderr) == (limit_s < 1), "a folder that cannot be written leaves stderr"


def test_a_process_that_does_not_hang_leaves_no_stacks(tmp_path: Path) -> None:
    stacks = tmp_path / "logs/stacks.txt"
    dog = Watchdog(60, stacks)
    assert size(stacks) == 0 and not stacks.parent.exists(), "another run's folder may still be there"
    for _ in range(2):
        with dog.watching():
            dog.mark()
    assert stacks.exists() and size(stacks) == 0
