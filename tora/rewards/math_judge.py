"""math-verify in a child process whose CPU time is limited for each question.

`\\boxed{9^{9^{9^9}}}` makes sympy compute for ever inside one C call that holds the interpreter's lock: no alarm and no
thread can end it, so one such completion would freeze a rollout worker. math-verify's own time-outs use
`signal.alarm`, which works in a main thread only and not in such a call; they are off here. The kernel ends a child
that thinks too long, even if its parent is gone, and CPU time makes the verdict independent of the machine's load.

The child runs this file as a script, which therefore imports nothing of Tora.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading


class MathJudge:
    """Whether two LaTeX expressions are equal. Thread-safe; the child starts at the first question."""

    def __init__(self, cpu_seconds: int = 5) -> None:
        """`cpu_seconds` per question."""
        self._cpu_seconds = cpu_seconds
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """False when they differ, when either cannot be parsed and when the child dies of the question.

        Raises `RuntimeError` when the child cannot start.
        """
        with self._lock:
            child = self._child or self._start()
            verdict = self._ask(child, json.dumps([gold, answer]))
            if not verdict:
                self.close()
            return verdict == "true\n"

    def close(self) -> None:
        """Ends the child; the next question starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps this folder, whose module names are common words, off the child's path.
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
        """The child's line, empty when it died."""
        assert child.stdin and child.stdout
        try:
            child.stdin.write(question + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            return ""
        return child.stdout.readline()


def _serve(cpu_seconds: int) -> None:
    """Answers `true` or `false` to each JSON line `[gold, answer]` until its input ends, as when the parent dies."""
    import logging
    import resource
    import signal
    import time

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C in a terminal reaches it too, and the parent may finish a step
    from math_verify import parse, verify

    logging.disable()  # math-verify warns of its missing time-outs and logs each expression that it cannot parse
    answers, sys.stdout = sys.stdout, sys.stderr  # a library's print must not look like an answer
    hard_limit = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + cpu_seconds, hard_limit))
        gold, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))  # pyright: ignore
        print(json.dumps(bool(verify(gold, answer, timeout_seconds=None))), file=answers, flush=True)


shared = MathJudge()
"""One child serves all threads of a process."""
atexit.register(shared.close)

if __name__ == "__main__":
    _serve(int(sys.argv[1]))
