"""A real Ray head on free loopback ports, for tests that submit jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef" * 4
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")


@dataclass(frozen=True)
class Head:
    environment: dict[str, str]
    """For programs that connect to the head."""
    port: int
    dashboard_port: int
    folder: Path

    def run(self, *words: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [str(word) for word in words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=ROOT, timeout=timeout)

    def ray(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return self.run(BIN / "ray", *words, timeout=timeout)

    def get(self, path: str, timeout: float = 10) -> Any:
        """The dashboard's JSON answer to a request with the token."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard_port}{path}")
        request.add_header("Authorization", f"Bearer {TOKEN}")
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def processes(self) -> list[psutil.Process]:
        """Running processes that this head or its jobs started."""
        return [p for p in psutil.process_iter() if str(self.folder) in " ".join(_words(p))]


BIN = Path(sys.executable).parent


def _words(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), process.environ().get("RAY_TMPDIR", "")]
    except psutil.Error:  # the process has ended
        return []


@contextmanager
def ray_head(num_cpus: int = 6) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="tr"))  # short: the paths of sockets are limited
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps 127.0.0.1 as the node's address
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
    }
    environment.pop("RAY_ADDRESS", None)
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += [f"--num-cpus={num_cpus}", f"--temp-dir={folder}", "--object-store-memory=300000000"]
    options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    head = Head(environment, ports["port"], ports["dashboard-port"], folder)
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", *options], env=environment, stdout=output, stderr=output
        )
    try:
        _wait_until_up(head, process, log)
        yield head
    finally:
        process.terminate()
        process.wait(60)
        psutil.wait_procs(head.processes(), timeout=20)
        left = [" ".join(_words(p))[:200] for p in head.processes()]
        shutil.rmtree(folder, ignore_errors=True)
    assert not left


def _wait_until_up(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once the dashboard and its agent answer a request with the token."""
    deadline = time.monotonic() + 120
    while True:
        try:
            head.get("/api/jobs/", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
