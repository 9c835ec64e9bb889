"""Short runs of the quick-start config, with real data, models, Ray and vLLM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from processes import descendants, listening
from runs import SHORT, read, steps
from runs import train as short_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tora.config.load import load_config
from tora.errors import ConfigError
from tora.launch.launcher import run

HERE = ["async_rl=false", "rollout.engine=torch"]
KEYS = (
    "reward/mean loss/total mismatch_kl staleness/mean staleness/max sync/bytes sync/seconds "
    "rollout/tokens_per_s time/step_s version"
)


def train(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    return short_run("quickstart", folder, *overrides)


def check_whole(folder: Path, rows: list[dict[str, Any]]) -> None:
    assert [row["version"] for row in steps(rows)] == [1, 2, 3]
    assert all(set(KEYS.split()) <= row.keys() for row in steps(rows))
    assert len([row for row in rows if "eval/accuracy" in row]) == 3, "before, during and after"
    assert [row["version"] for row in rows if "canary/gap_mean" in row] == [2], "every second version"
    for name in ("config.yaml", "reward_curve.png", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


@pytest.mark.parametrize(
    ("lora_type", "quantize_base"),
    [("full", False), ("lora", False), ("dora", False), ("dora_cache", False), ("dora_cache", True)],
)
def test_in_one_process(tmp_path: Path, lora_type: str, quantize_base: bool) -> None:
    overrides = [*HERE, f"model.lora_type={lora_type}", f"model.quantize_base={quantize_base}"]
    overrides += ["loss.kl_coeff=0.01", "ppo_epochs=2"]
    if lora_type == "full":
        train(tmp_path / "run", *overrides)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").num_parameters() > 0
        return
    rows = train(tmp_path / "run", *overrides)
    check_whole(tmp_path / "run", rows)
    assert all("kl/mean" in row for row in steps(rows))
    assert max(row["mismatch_kl"] for row in steps(rows)) < 1e-9, "engine and learner are one model"
    base = AutoModelForCausalLM.from_pretrained(load_config("quickstart").model.path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert next(iter(adapted.peft_config.values())).use_dora == (lora_type != "lora")


@pytest.mark.parametrize("quantize_base", [False, True])
def test_a_resumed_run_has_the_metrics_of_an_uninterrupted_one(tmp_path: Path, quantize_base: bool) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    overrides = [*HERE, "model.lora_type=dora_cache", "num_steps=5", "checkpoint.keep=9", "rollout.max_refills=1"]
    overrides.append(f"model.quantize_base={quantize_base}")
    rows = train(whole, *overrides)
    shutil.copytree(whole, resumed)
    for later in ("step_000004", "step_000005"):
        shutil.rmtree(resumed / "checkpoints" / later)
    again = train(resumed, *overrides, "resume_from_checkpoint=true")

    def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        timed = ("time/", "memory/", "sync/seconds", "rollout/tokens_per_s")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in steps(rows)]

    assert len(steps(again)) == 5
    assert comparable(again) == comparable(rows)
    final = "checkpoints/step_000005/weights.safetensors"
    a, b = load_file(whole / final), load_file(resumed / final)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resuming_without_a_checkpoint_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        train(tmp_path / "run", *HERE, "resume_from_checkpoint=true")
    assert not (tmp_path / "run").exists()


def test_overlong_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    prompts = ["1 + 2 =", "1 + " * 50, "3 + 4 =", "5 + 1 ="]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt, "answer": "3"}) + "\n" for prompt in prompts))
    dataset = f"dataset={{_component_: tora.tasks.dataset.file_dataset, path: {data}}}"
    rows = steps(train(tmp_path / "run", *HERE, dataset, "max_prompt_tokens=40", "eval=null", "rollout.max_refills=0"))
    read = [i for row in rows for i in row["prompt_ids"]]
    assert len(read) == 12
    assert sum(row["rollout/prompts_dropped"] for row in rows) == max(read) + 1 - len(read) > 0


def test_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("precious", "config.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("kept")
    train(tmp_path / "run", *HERE, "num_steps=1", "eval=null")
    assert (tmp_path / "run.1" / "precious").read_text() == "kept"
    assert not (tmp_path / "run" / "precious").exists()


def test_a_synchronous_torch_run_imports_neither_ray_nor_vllm(tmp_path: Path) -> None:
    words = ["run", "quickstart", *SHORT, *HERE, "num_steps=1", f"output_dir={tmp_path / 'run'}"]
    code = f"import sys; from tora.cli import main; assert main({words!r}) == 0; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"ray", "vllm"} & set(loaded)


def test_a_terminated_run_leaves_a_checkpoint_to_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    words = [*SHORT, *HERE, "num_steps=500", "eval=null", f"output_dir={folder}"]
    child = subprocess.Popen([sys.executable, "-m", "tora", "run", "quickstart", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not steps(read(folder)):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 130
    done = int(sorted((folder / "checkpoints").iterdir())[-1].name.removeprefix("step_"))
    assert done == len(steps(read(folder)))
    rows = train(
        folder, *HERE, "eval=null", "resume_from_checkpoint=true", f"num_steps={done + 1}", "optimizer.lr=1e-5"
    )
    (said,) = (text for text in caplog.messages if text.startswith("resuming with changed settings: "))
    assert f" -> {done + 1}, " in said and said.endswith("optimizer.lr 0.0006 -> 1e-05"), said
    assert 0 < steps(rows)[-1]["learner/lr"] <= 1e-5
    assert [row["version"] for row in steps(rows)] == list(range(1, done + 2))
    assert train(folder, *HERE, "eval=null", "resume_from_checkpoint=true", "num_steps=1") == rows
    assert any("has finished its 1 steps" in text for text in caplog.messages)


def test_two_ranks_of_this_machine(tmp_path: Path) -> None:
    words = ["--nproc_per_node", "2", "lora_grpo_distributed", "--config", "quickstart", *SHORT, *HERE]
    words += ["sync.canary_every=2", "model.lora_type=dora", f"output_dir={tmp_path / 'two'}"]
    command, ports = [sys.executable, "-m", "tora", "run", *words], set[int]()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            ports |= listening(descendants(child.pid))
            time.sleep(0.1)
    assert child.returncode == 0 and ports
    two = read(tmp_path / "two")
    check_whole(tmp_path / "two", two)
    one = train(tmp_path / "one", *HERE, "model.lora_type=dora")
    for a, b in zip(steps(one), steps(two), strict=True):
        for key in ("reward/mean", "loss/total", "learner/grad_norm", "policy/entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


def base_bytes() -> int:
    return os.path.getsize(Path(load_config("quickstart").model.path) / "model.safetensors")


@pytest.mark.parametrize(("lora_type", "bound"), [("lora", 1), pytest.param("dora_cache", 0, marks=pytest.mark.slow)])
def test_asynchronous_with_vllm(tmp_path: Path, lora_type: str, bound: int) -> None:
    ranks = [f"learner_ranks={1 + bound}", f"step_parts={1 + bound}"]
    rows = train(tmp_path / "run", f"model.lora_type={lora_type}", f"max_staleness={bound}", *ranks)
    check_whole(tmp_path / "run", rows)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    # the adapter's magnitude is sent as a gain of the same size
    assert {row["sync/bytes"] for row in steps(rows)} == {sum(t.numel() * 4 for t in adapter.values())}
    assert steps(rows)[0]["sync/bytes"] < 0.05 * base_bytes()
    assert max(row["staleness/max"] for row in steps(rows)) == bound
    fresh = [row["mismatch_kl"] for row in steps(rows) if row["staleness/max"] == 0]
    assert fresh and max(fresh) < 1e-9, "vLLM serves the policy that the learner holds"
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "vllm_dist", "plasma"))]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["rollout.update=in_flight"], id="keep"),
        pytest.param(["rollout.update=in_flight", "rollout.recompute_kv=true"], id="recompute", marks=pytest.mark.slow),
        pytest.param(["rollout.partial=6"], id="partial", marks=pytest.mark.slow),
    ],
)
def test_asynchronous_with_policy_versions_that_change_within_rollouts(tmp_path: Path, words: list[str]) -> None:
    """`test_weight_updates` checks that each token comes from the policy of its version."""
    rows = train(tmp_path / "run", *words, "max_staleness=2", "rollout.concurrency=3")
    check_whole(tmp_path / "run", rows)
    assert max(row["staleness/max"] for row in steps(rows)) <= 2
    assert all(row["sync/stall_ms"] > 0 for row in steps(rows))
    assert all(row["mismatch_kl"] < 1e-9 for row in steps(rows) if row["staleness/max"] == 0)
    assert max(row["canary/gap_max"] for row in steps(rows) if "canary/gap_max" in row) < 1e-4


@pytest.mark.parametrize(
    ("base", "where"),
    [
        pytest.param("dequantized", "async_rl=true", marks=pytest.mark.slow),
        ("dequantized", "async_rl=false"),
        ("checkpoint", "async_rl=false"),
    ],
)
def test_with_vllm_and_a_quantised_base(tmp_path: Path, base: str, where: str) -> None:
    quantized = ["model.quantize_base=true", f"rollout.base={base}", "model.lora_type=dora_cache", "max_staleness=0"]
    proof = ["sync.canary_every=2" if base == "dequantized" else "sync.canary_max_gap=2"]
    rows = train(tmp_path / "run", *quantized, where, *proof)
    check_whole(tmp_path / "run", rows)
    gaps = [row["mismatch_kl"] for row in steps(rows)]
    assert max(gaps) < 1e-9 if base == "dequantized" else min(gaps) > 1e-4
    assert not (tmp_path / "run" / "rollout_base").exists()


REWARDS = """\
import asyncio

async def later(completions, **columns):
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)

def loud(completions):
    print("a reward saw", len(completions))
    return [0.0] * len(completions)
"""


def test_asynchronous_with_two_workers_and_the_torch_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "async_reward_of_a_run.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    rewards = "rewards=[tora.rewards.answer_tag, async_reward_of_a_run.later, async_reward_of_a_run.loud]"
    where = ["rollout.engine=torch", "rollout.num_workers=2", "max_staleness=0", "model.lora_type=dora"]
    rows = train(tmp_path / "run", rewards, *where)
    check_whole(tmp_path / "run", rows)
    assert {row["reward/later"] for row in steps(rows)} == {0.5}
    assert "a reward saw 4" in capsys.readouterr().out, "what is printed in a Ray actor's processes"
    assert {row["staleness/max"] for row in steps(rows)} == {0}
    assert max(row["mismatch_kl"] for row in steps(rows)) < 1e-9


def test_in_one_process_with_vllm(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", "async_rl=false", "model.lora_type=dora")
    check_whole(tmp_path / "run", rows)
    assert {row["staleness/max"] for row in steps(rows)} == {0}
    assert max(row["mismatch_kl"] for row in steps(rows)) < 1e-9


def test_whole_weights_with_vllm(tmp_path: Path) -> None:
    cfg = ["async_rl=false", "rollout.engine=vllm", "model.lora_type=full", "optimizer.lr=1e-3"]
    rows = steps(train(tmp_path / "run", *cfg))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {row["sync/bytes"] for row in rows} == {4 * model.num_parameters()}, "every weight, once"
    assert max(row["mismatch_kl"] for row in rows) < 1e-9
    assert {row["staleness/max"] for row in rows} == {0}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lora_type", ["lora", "dora", "dora_cache"])
@pytest.mark.parametrize("where", [HERE, []], ids=["torch", "async vllm"])
def test_the_quickstart_learns(tmp_path: Path, lora_type: str, where: list[str]) -> None:
    run(load_config("quickstart", [f"output_dir={tmp_path / 'run'}", f"model.lora_type={lora_type}", *where]))
    accuracies = [row["eval/accuracy"] for row in read(tmp_path / "run") if "eval/accuracy" in row]
    assert accuracies[0] < 0.5 and accuracies[-1] >= 0.75
