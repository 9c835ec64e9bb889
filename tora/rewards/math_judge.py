"""math-verify in a child process with a CPU time limit per question.

`\\boxed{9^{9^{9^9}}}` makes sympy compute forever inside one C call that holds the interpreter lock. No alarm or thread
can interrupt it, so one such completion would freeze a rollout worker. math-verify's own timeouts use `signal.alarm`,
which works only in the main thread and not during such a call; they are switched off here. Instead the kernel kills a
child that exceeds its limit, even after the parent has died. Limiting CPU time rather than wall time makes the verdict
independent of the machine's load.

The child runs this file as a script, so it imports nothing from Tora.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from typing import Any

_TINY = 1e-3


class MathJudge:
    """Decides whether two LaTeX expressions are equal. Thread-safe. The child starts with the first question."""

    def __init__(self, cpu_seconds: int = 5) -> None:
        """`cpu_seconds`: limit per question."""
        self._cpu_seconds = cpu_seconds
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """False if they differ, if either cannot be parsed, or if the question kills the child.

        Raises RuntimeError if the child does not start.
        """
        with self._lock:
            child = self._child or self._start()
            verdict = self._ask(child, json.dumps([gold, answer]))
            if not verdict:
                self.close()
            return verdict == "true\n"

    def close(self) -> None:
        """Kills the child; the next question starts a new one."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps this folder, whose modules have common names, off the child's path.
        self._child = subprocess.Popen(
            [sys.executable, "-P", __file__, str(self._cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._ask(self._child, json.dumps(["1", "1"])) != "true\n":
            self.close()
            raise RuntimeError("the math-verify process did not start")
        return self._child

    @staticmethod
    def _ask(child: subprocess.Popen[str], question: str) -> str:
        """The child's line; empty if it died."""
        assert child.stdin and child.stdout
        try:
            child.stdin.write(question + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            return ""
        return child.stdout.readline()


def _serve(cpu_seconds: int) -> None:
    """Answers `true` or `false` to each JSON line `[gold, answer]` until the input ends, also when the parent dies."""
    import logging
    import resource
    import signal
    import time

    # Ctrl-C in a terminal also reaches the child, as does SIGTERM from what stops all processes of a job, and the
    # parent may still have to finish a step. Programs that a function starts would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    from math_verify import parse, verify

    logging.disable()  # math-verify warns about switched-off timeouts and logs each expression it cannot parse
    answers, sys.stdout = sys.stdout, sys.stderr  # so that a library's print is not read as an answer
    hard_limit = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + cpu_seconds, hard_limit))
        gold, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))  # pyright: ignore
        equal = verify(gold, answer, timeout_seconds=None) and not _are_tiny_and_differ(gold, answer)
        print(json.dumps(bool(equal)), file=answers, flush=True)


def _are_tiny_and_differ(gold: list[Any], answer: list[Any]) -> bool:
    """Whether both are numbers below 0.001 that differ by more than 0.1 %.

    math-verify takes tiny numbers for equal: it rounds to six decimals and drops what is below 1e-15.
    """
    values = [parsed[0] for parsed in (gold, answer) if parsed]
    if len(values) < 2 or not all(getattr(value, "is_number", False) for value in values):
        return False
    a, b = (value.doit().evalf(15) for value in values)
    largest = max(abs(a), abs(b))
    return bool(largest < _TINY and abs(a - b) > _TINY * largest)


shared = MathJudge()
"""One child for all threads of this process."""
atexit.register(shared.close)

if __name__ == "__main__":
    _serve(int(sys.argv[1]))
