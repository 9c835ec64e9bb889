"""The ranks of a synchronous run: small programs in the place of a rank."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from tora.distributed.process_group import STORE_KEY
from tora.launch.local_ranks import run_ranks
from tora.launch.signals import Stop

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", STORE_KEY)


def run(code: str, count: int = 2, stop: Stop | None = None) -> int:
    head = "import json, os, signal, sys, time; from pathlib import Path; rank = int(os.environ['RANK']); "
    return run_ranks(["-c", head + code], count, stop)


def test_ranks_know_each_other_and_meet_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    code = f"Path({str(tmp_path)!r}, str(rank)).write_text(json.dumps([os.environ[name] for name in {_NAMES!r}]))"
    assert run(code, 3) == 0
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [told[:5] for told in seen] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({(port, key) for *_, port, key in seen}) == 1 and len(seen[0][-1]) == 64


@pytest.mark.parametrize(
    ("first", "code", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit(130)", 130, ""),
        ("os.kill(os.getpid(), 9)", 1, "rank 0 was killed by SIGKILL, which ended the others\n"),
    ],
)
def test_the_first_to_fail_ends_the_others(
    first: str, code: int, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tora.launch.local_ranks.END_S", 0.5)
    began = time.monotonic()
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert run(f"time.sleep(0.3); {first} if rank == 0 else None; {stubborn}") == code
    assert time.monotonic() - began < 10 and capfd.readouterr().err == said


class Asked(Stop):
    asked = False

    @property
    def requested(self) -> bool:
        return self.asked


def test_a_stop_reaches_each_rank_once(tmp_path: Path) -> None:
    stop = Asked()
    count = f"signal.signal(signal.SIGTERM, lambda *_: open(Path({str(tmp_path)!r}, str(rank)), 'a').write('x')); "
    ready = f"Path({str(tmp_path)!r}, 'ready%d' % rank).touch(); "

    def ask() -> None:
        while len([*tmp_path.glob("ready*")]) < 2:
            time.sleep(0.02)
        stop.asked = True

    threading.Thread(target=ask, daemon=True).start()
    waits = f"[time.sleep(0.1) for _ in iter(lambda: Path({str(tmp_path)!r}, str(rank)).exists(), True)]; "
    assert run(count + ready + waits + "time.sleep(0.5); sys.exit(130)", stop=stop) == 130
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["x", "x"]
