"""Twenty ways in which an environment can misbehave: none loses or doubles a rollout, each is named, the rest go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agents import Agents, agents, always_look, make_tool_model
from runs import own_imports, steps, train
from transformers import AutoTokenizer

from tora.reporting.completions import read_parquet
from tora.types import Completion, SampleRequest

ENVIRONMENT = '''
import ctypes, os, re, signal, threading, time

class Mute(Exception):
    def __str__(self):
        raise RuntimeError

class Bad:
    """The first of a group's environments to be reset misbehaves, if the row says so."""

    def reset(self, **row):
        self.row, self.calls = row, 0
        try:
            os.close(os.open(row["mark"], os.O_CREAT | os.O_EXCL))
            self.bad = True
        except FileExistsError:
            self.bad = False
        return self._act("reset")

    def look(self) -> str:
        """
        Look.
        """
        self.calls += 1
        return self._act("look") or "nothing"

    def get_reward(self):
        return self._act("get_reward") or float(self.calls)

    def _act(self, where):
        if not self.bad or where != self.row["where"]:
            return None
        how = self.row["how"]
        if how == "raise": raise ValueError("bad")
        if how == "mute": raise Mute()
        if how == "interrupt": raise KeyboardInterrupt
        if how == "sys.exit": raise SystemExit(3)
        if how == "exit": os._exit(3)
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if how == "crash": ctypes.string_at(0)
        if how == "sleep": time.sleep(3600)
        if how == "lock": re.match("(a+)+$", "a" * 60 + "b")
        if how == "memory": self.held = [bytearray(2**26) for _ in range(2**10)]
        if how == "leak": self.held = getattr(self, "held", None) or bytearray(450 * 2**20)
        if how == "files": os.closerange(3, 256)
        if how == "recursion": return self._act(where)
        if how == "list": return [1]
        if how == "nan": return float("nan")
        if how == "huge": return "x" * 2_000_000
        if how == "surrogate": return "\\ud800"
        if how == "object": return object()
'''

TOLD = "told"
"""The policy reads of the error, and no rollout is lost."""
CASES = [
    ("reset", "raise", "raised ValueError: bad"),
    ("reset", "mute", "raised Mute"),
    ("reset", "sys.exit", "raised SystemExit"),
    ("reset", "exit", "ended its process"),
    ("reset", "sleep", "took longer"),
    ("reset", "list", "returned a list"),
    ("reset", "huge", "2,000,000 characters"),
    ("reset", "memory", "raised MemoryError|ended its process"),
    ("look", "raise", TOLD),
    ("look", "mute", TOLD),
    ("look", "recursion", TOLD),
    ("look", "huge", TOLD),
    ("look", "surrogate", ""),
    ("look", "object", ""),
    ("look", "interrupt", "raised KeyboardInterrupt"),
    ("look", "kill", "ended its process"),
    ("look", "crash", "ended its process"),
    ("look", "lock", "took longer"),
    ("look", "files", "ended its process|took longer"),
    ("look", "leak", ""),
    ("get_reward", "nan", "returned nan"),
    ("get_reward", "sleep", "took longer"),
]


class Dots:
    """An engine that always says "." and stops."""

    def __init__(self, word: int, stop: int) -> None:
        self._ids = np.array([word, stop])

    def generate(self, requests: list[SampleRequest]) -> list[list[Completion]]:
        half = np.full(2, -0.5, dtype=np.float32)
        one = Completion(self._ids, half, half, np.zeros(2, dtype=np.int64), stopped=True)
        return [[one] * request.num_samples for request in requests]

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    folder = make_tool_model(tmp_path_factory.mktemp("model"))
    (folder / "bad.py").write_text(ENVIRONMENT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine: Any = Dots(tokenizer(".")["input_ids"][0], tokenizer.eos_token_id)
    options: dict[str, Any] = {"factory": "bad.Bad", "iterations": 2, "timeout_s": 4.0, "memory_gib": 0.6}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_imports(patch)
        with agents(lambda: engine, folder, parse=always_look, **options) as one:
            yield one


@pytest.mark.slow  # each case that ends a process starts another
@pytest.mark.parametrize(("where", "how", "said"), CASES)
def test_a_bad_environment_is_named_and_the_rest_go_on(
    made: Agents, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str, how: str, said: str
) -> None:
    row = {"where": where, "how": how, "mark": str(tmp_path / "mark")}
    bad = made.worker.run_group(made.prompt(1, **row))
    left_out = [failure for failure in bad.failures if failure.parts is None]
    assert len(bad.rollouts) + len(left_out) == 4, "no rollout is lost or counted twice"
    if said in (TOLD, ""):
        assert not bad.failures and len(bad.rollouts) == 4
        assert sum(rollout.tool_errors for rollout in bad.rollouts) == (2 if said == TOLD else 0)
        assert said != TOLD or "of an environment" in caplog.text or how != "raise"
    else:
        assert any(re.search(said, failure.reason) for failure in bad.failures), bad.failures
    good = made.worker.run_group(made.prompt(2, **row))
    assert [rollout.reward for rollout in good.rollouts] == [2.0] * 4 and not good.failures
    assert how != "leak" or "is replaced" in caplog.text


GUESSER = (
    ENVIRONMENT.replace("def look(self)", "def guess(self, number: int)")
    .replace("Look.\n", "Guess.\n\n        Args:\n            number: The guess.\n")
    .replace('self._act("reset")', 'self._act("reset") or " It is between 1 and 30."')
)
"""The same for the base of `quickstart_guess`, which then guesses."""
RUN = [
    "rollout.engine=torch", "batch_size=8", "num_steps=3", "max_generated_tokens=96", "log_completions=1",
    "max_tool_calling_iterations=2", "environment_timeout_s=4", "reward_timeout_s=4", "environment_processes=8",
    "environment_memory_gib=0.6", "dataset._component_=bad.rows", "environment_factory._component_=bad.Bad",
    "max_failed_rewards=0.9",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["async_rl=false", "async_rl=true"])
def test_a_run_survives_them_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    schedule: str,
) -> None:
    cases = [(where, how) for where, how, _ in CASES] + [("never", "")] * 2
    rows = [
        {"prompt": "Guess my number.", "where": where, "how": how, "mark": str(tmp_path / f"{where}.{how}")}
        for where, how in cases
    ]
    varied = GUESSER.replace("float(self.calls)", "time.perf_counter() % 1")  # every group has a signal
    held_out = varied.replace('row["mark"]', 'row.get("mark", os.devnull)')  # nothing bad in evaluations
    (tmp_path / "bad.py").write_text(f"{held_out}\ndef rows():\n    return {rows!r}\n")
    monkeypatch.chdir(tmp_path)
    own_imports(monkeypatch)
    written = train("quickstart_guess", tmp_path / "run", *RUN, schedule)
    said = caplog.text + "".join(capfd.readouterr())
    assert len(steps(written)) == 3, "the run ends well"
    ids = [
        row["prompt_id"]
        for step in (1, 2, 3)
        for row in read_parquet(tmp_path / f"run/completions/step_{step}.parquet")
    ]
    assert len(set(ids)) == 24 and all(2 <= ids.count(number) <= 4 for number in ids), "no group is trained on twice"
    failed = [sum(v for k, v in row.items() if k.startswith("reward/failed/")) for row in steps(written)]
    generated = sum(f / row["reward/failed_share"] for f, row in zip(failed, steps(written), strict=True) if f)
    assert generated == pytest.approx(4 * round(generated / 4)) and generated >= 96, "no rollout is lost"
    for where, how, pattern in CASES:
        assert (tmp_path / f"{where}.{how}").exists(), "it was played"
        if pattern not in (TOLD, ""):
            assert re.search(pattern, said), (where, how)
