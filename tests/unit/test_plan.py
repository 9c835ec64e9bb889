"""The plan of a run: shipped configs against cards, what is refused, and with which advice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tora.cli import main
from tora.config.load import config_file, config_names, load_config
from tora.config.schema import RunConfig
from tora.distributed.device import machine_memory
from tora.errors import ConfigError
from tora.launch.engines import resolved_engine
from tora.launch.memory import Devices, check_memory, model_shapes, nominal, plan_run
from tora.models.released import shape_of_folder
from tora.plan.advice import changed
from tora.plan.places import GIB, RunPlan
from tora.plan.training import state_bytes

FITS = re.compile(r"^# fits (one|two|four|eight) (\d+) GB GPUs?$", re.MULTILINE)
RANKS = {"one": 1, "two": 2, "four": 4, "eight": 8}
SIZED = [name for name in config_names() if name.endswith(("single_device", "_grpo"))]


def resolved(name: str, *overrides: str) -> RunConfig:
    return resolved_engine(load_config(name, overrides), on_gpu=True, has_vllm=True)


def planned(cfg: RunConfig, gpu_gib: float, gpus: int | None = None) -> RunPlan:
    return plan_run(cfg, model_shapes(cfg), Devices(True, nominal(gpu_gib), gpus))


def test_shipped_configs_fit_the_cards_that_they_name() -> None:
    """All whose model has a plan; one that only fits with every other program closed is no help, so 5 % are left."""
    checked = 0
    for name in SIZED:
        found = FITS.search(config_file(name).read_text())
        if shape_of_folder(Path(load_config(name).model.path).name) is None:
            assert found is None, f"{name} names a card, but transformers' code runs its model"
            continue
        assert found is not None, f"{name} names no card"
        checked += 1
        ranks = RANKS[found[1]]
        assert (ranks == 1) == name.endswith("single_device"), name
        plan = planned(resolved(name, f"learner_ranks={ranks}"), float(found[2]))
        assert plan.fits, f"{name}: {plan.why_not()}"
        assert all(place.total <= 0.95 * (place.capacity or 0) for place in plan.places), name
        assert plan.rollouts >= 24, name
    assert checked > 80


@pytest.mark.parametrize("gpu_gib", [24, 40, 80])
def test_a_plan_is_the_same_by_hand(gpu_gib: int) -> None:
    """Qwen3-0.6B with LoRA, counted from its config.json: 28 layers of 1024 x (2048 + 2 x 1024), 2048 x 1024 and 3 x
    1024 x 3072, an embedding of 151,936 x 1024, and 8 heads of 128 for keys and values."""
    cfg = resolved("qwen3/0.6B_lora_grpo_single_device", "rollout.sleep=false", "rollout.share_base=false")
    (place,) = planned(cfg, gpu_gib).places
    weights = 28 * (1024 * 4096 + 2048 * 1024 + 3 * 1024 * 3072) + 151_936 * 1024
    assert place.parts["engine weights"] == pytest.approx(2 * weights, rel=1e-3)
    assert place.parts["base weights"] == pytest.approx(2 * weights, rel=1e-3)
    adapters = 28 * 8 * ((1024 + 2048) + 2 * (1024 + 1024) + (2048 + 1024) + 3 * (1024 + 3072))
    assert place.parts["adapters"] == place.parts["gradients"] == 4 * adapters
    assert place.parts["optimizer state"] == 8 * adapters
    engine = sum(place.parts[name] for name in ("engine weights", "adapter slots", "engine steps", "CUDA graphs"))
    assert place.parts["key-value cache"] == pytest.approx(0.45 * nominal(gpu_gib) - engine, abs=2)
    rollouts = place.parts["key-value cache"] // (28 * 2 * 8 * 128 * 2) // 1024
    assert planned(cfg, gpu_gib).rollouts == rollouts


def test_learner_and_sleeping_engine_take_turns() -> None:
    kept, asleep = (
        planned(resolved(WIDE, f"rollout.sleep={value}", "rollout.gpu_memory_utilization=0.45"), 80).places[0].parts
        for value in ("false", "auto")
    )
    work = {name for name in kept if name.startswith("activations")} | {"gradients", "optimizer step"}
    generating = {"key-value cache", "engine steps"}
    smaller = min((work, generating), key=lambda names: sum(kept[name] for name in names))
    assert all(asleep[name] == 0 for name in smaller) and any(kept[name] for name in smaller)
    assert dict(asleep) == {n: s for n, s in kept.items() if n not in smaller}


def test_a_shared_base_is_held_once() -> None:
    once, twice = (
        planned(resolved(WIDE, f"rollout.share_base={value}"), 80).places[0].parts for value in ("true", "false")
    )
    assert once["base weights"] < 0.001 * twice["base weights"] and twice["base weights"] > 15 * GIB
    assert once["engine weights"] == twice["engine weights"]
    for overrides in (["model.quantize_base=true"], ["rollout.dtype=fp32"], ["learner_ranks=2"], ["async_rl=true"]):
        assert planned(resolved(WIDE, *overrides), 80).places[0].parts["base weights"] > 0.2 * twice["base weights"]


def test_the_engine_gets_more_where_learner_and_cache_take_turns_over_one_base() -> None:
    def cache(*overrides: str) -> int:
        return planned(resolved(WIDE, *overrides), 80).places[0].parts["key-value cache"]

    assert cache() - cache("rollout.sleep=false") == pytest.approx((0.675 - 0.45) * nominal(80), abs=2)
    assert cache("rollout.share_base=false") == cache("rollout.sleep=false")
    assert cache("rollout.gpu_memory_utilization=0.45") == cache("rollout.sleep=false")


def test_sleep_is_refused_where_nothing_could_use_the_memory() -> None:
    for overrides in (["async_rl=true"], ["rollout.engine=torch"]):
        with pytest.raises(ConfigError, match=r"rollout\.sleep=true needs async_rl=false and rollout\.engine=vllm"):
            resolved(WIDE, "rollout.sleep=true", *overrides)


WIDE = "qwen3/8B_lora_grpo_single_device"


def test_what_does_not_fit_is_refused_with_settings_that_fit() -> None:
    cfg = resolved(WIDE, "activation_checkpointing=none", "micro_batch_tokens=16384")
    with pytest.raises(ConfigError) as refused:
        check_memory(cfg, Devices(True, nominal(80)))
    sentence = str(refused.value)
    assert "The GPU needs 1" in sentence and "of 78.8 GiB" in sentence
    ways = sentence.partition("It would fit with ")[2].partition(". memory_plan=warn")[0].split("; or with ")
    assert 2 <= len(ways) <= 3 and "activation_checkpointing=full" in ways
    for way in ways:
        assert planned(
            resolved(WIDE, "activation_checkpointing=none", "micro_batch_tokens=16384", *way.split()), 80
        ).fits


def test_settings_are_combined_where_one_is_not_enough() -> None:
    large = ["activation_checkpointing=none", "micro_batch_tokens=131072", "max_generated_tokens=8000"]
    cfg = resolved("qwen3/4B_qlora_grpo_single_device", *large)
    with pytest.raises(ConfigError, match=r"fit with activation_checkpointing=full \S+=\S+") as refused:
        check_memory(cfg, Devices(True, nominal(24)))
    way = str(refused.value).partition("It would fit with ")[2].partition("; or with ")[0].partition(". memory")[0]
    assert planned(resolved("qwen3/4B_qlora_grpo_single_device", *large, *way.split()), 24).fits


def test_a_model_that_no_setting_makes_fit_is_refused_all_the_same() -> None:
    cfg = resolved("qwen3/32B_lora_grpo_single_device", "activation_checkpointing=full")
    with pytest.raises(ConfigError, match="No setting that leaves the model as it is would make it fit"):
        check_memory(cfg, Devices(True, nominal(16)))


def test_a_run_says_its_plan_in_one_line() -> None:
    line = planned(resolved("qwen3/0.6B_lora_grpo_single_device"), 24).line()
    assert "\n" not in line
    assert re.match(r"memory plan: GPU \d+\.\d GiB of 23\.6 GiB \(key-value cache \d", line)
    assert line.endswith("cache for 125 rollouts of 1,024 tokens")
    small = plan_run(cfg := resolved("quickstart"), model_shapes(cfg), Devices(False, 24 * GIB)).line()
    assert " 0.0" not in small, "parts that do not show are left out"


def test_a_user_may_start_it_anyway(caplog: pytest.LogCaptureFixture) -> None:
    cfg = resolved(WIDE, "activation_checkpointing=none", "micro_batch_tokens=16384", "memory_plan=warn")
    plan = check_memory(cfg, Devices(True, nominal(80)))
    assert plan is not None and not plan.fits
    assert "The GPU needs" in caplog.text and "activation_checkpointing=full" in caplog.text


def test_a_gpu_of_unknown_size_refuses_nothing() -> None:
    plan = check_memory(resolved(WIDE), Devices(True, None))
    assert plan is not None and plan.fits and plan.rollouts > 0


def test_a_cpu_warns_unless_the_weights_alone_are_too_large(caplog: pytest.LogCaptureFixture) -> None:
    cfg = resolved(WIDE, "rollout.kv_cache_gib=1")
    plan = check_memory(cfg, Devices(False, 400 * GIB))
    assert plan is not None and plan.fits and not caplog.text
    check_memory(cfg, Devices(False, 36 * GIB))
    assert "The machine needs" in caplog.text
    with pytest.raises(ConfigError, match="The machine needs"):
        check_memory(cfg, Devices(False, 20 * GIB))


def test_a_model_of_transformers_has_the_plan_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """The same model either way; what its plan says of a GPU is a warning, as it was never measured on one."""
    for changes in ([], ["model.lora_type=full"], ["model.quantize_base=true"], ["activation_checkpointing=full"]):
        ours, theirs = (
            resolved("quickstart", f"model.implementation={i}", *changes) for i in ("native", "transformers")
        )
        assert model_shapes(theirs).weights == model_shapes(ours).weights
        for devices in (Devices(True, None), Devices(False, None)):
            plans = [plan_run(cfg, model_shapes(cfg), devices).places for cfg in (theirs, ours)]
            found, expected = (sum(place.total for place in places) for places in plans)
            assert found == pytest.approx(expected, rel=0.1), (changes, devices)
    cfg = resolved("quickstart", "model.implementation=transformers")
    assert check_memory(cfg, Devices(True, nominal(0.1))) is not None
    assert "The learner's GPU needs" in caplog.text


def test_a_cache_without_room_for_one_sequence_is_refused() -> None:
    cfg = resolved("qwen3/0.6B_lora_grpo_single_device", "rollout.max_model_len=200000")
    with pytest.raises(ConfigError, match="no room for a sequence of 200,000 tokens"):
        check_memory(cfg, Devices(True, nominal(24)))


def test_an_asynchronous_run_has_a_gpu_for_each_or_shares_one() -> None:
    cfg = resolved("qwen3/0.6B_lora_grpo_single_device", "async_rl=true")
    learner, engine = planned(cfg, 24).places
    assert "key-value cache" in engine.parts and "key-value cache" not in learner.parts
    (shared,) = planned(cfg, 24, gpus=1).places
    assert shared.parts["engine weights"] and shared.parts["optimizer state"]
    assert shared.parts["key-value cache"] < engine.parts["key-value cache"]


def total(cfg: RunConfig) -> float:
    return sum(place.total for place in plan_run(cfg, model_shapes(cfg), Devices(True, None)).places)


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"micro_batch_tokens": 16384}, True),
        ({"activation_checkpointing": "full"}, False),
        ({"model.quantize_base": True}, False),
        ({"model.lora_type": "dora_cache"}, True),
        ({"model.lora_rank": 64}, True),
        ({"model.lora_dropout": 0.1}, True),
        ({"learner_ranks": 4}, None),
        ({"batch_size": 1, "grpo_samples": 2}, False),
        ({"rollout.concurrency": 64}, True),
        ({"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-3}}, False),
    ],
    ids=str,
)
def test_settings_move_the_plan_the_right_way(change: dict[str, Any], more: bool | None) -> None:
    alone = ["rollout.share_base=false", "activation_checkpointing=none", "micro_batch_tokens=8192"]
    before = resolved("qwen3/8B_lora_grpo_single_device", *alone)
    after = changed(before, change)
    if more is None:  # shards weigh less, and gathered layers more
        assert total(after) != total(before)
    else:
        assert (total(after) > total(before)) == more


def test_a_kl_term_keeps_a_frozen_model_beside_trained_weights() -> None:
    plain = resolved("qwen3/0.6B_full_grpo_single_device")
    with_kl = resolved("qwen3/0.6B_full_grpo_single_device", "loss.kl_coeff=0.1")
    assert total(with_kl) - total(plain) == pytest.approx(2 * model_shapes(plain).weights, rel=0.06), (
        "5 % are fragments"
    )


def test_optimizers_keep_what_they_are_known_to_keep() -> None:
    assert state_bytes({"_component_": "torch.optim.AdamW"}) == 8
    assert state_bytes({"_component_": "torch.optim.SGD", "momentum": 0.9}) == 4
    assert state_bytes({"_component_": "torchao.optim.AdamW8bit"}) < 3
    assert state_bytes({"_component_": "my.optimizers.New"}) == 8, "as Adam, if it is not known"


def test_a_container_has_less_than_its_machine(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert machine_memory(cpu, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000 kB\nMemFree: 1 kB\n")
    assert machine_memory(cpu, tmp_path) == 1000 * 1024
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    limit.parent.mkdir(parents=True)
    for text, size in (("max\n", 1000 * 1024), ("2048\n", 2048)):
        limit.write_text(text)
        assert machine_memory(cpu, tmp_path) == size
    assert (machine_memory(cpu) or 0) > GIB


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen3/0.6B_lora_grpo_single_device", "--gpu-gib", "24"]) == 0
    printed = capsys.readouterr().out
    assert "GPU of 23.6 GiB" in printed and "key-value cache" in printed and "rollouts of 1,024 tokens" in printed
    over = ["plan", WIDE, "--gpu-gib", "80", "activation_checkpointing=none", "micro_batch_tokens=16384"]
    assert main(over) == 1
    assert "It would fit with" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--gpu-gib", "0"], ["--gpu-gib", "nan"], ["--gpu-gib", "inf"], ["--gpus", "0"]])
def test_sizes_that_are_none_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", *words]) == 2
    assert "must be greater than 0" in capsys.readouterr().err


def test_a_model_is_found_by_folder_by_name_and_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickstart = load_config("quickstart")
    by_folder = model_shapes(quickstart)
    by_name = model_shapes(load_config("qwen3/8B_lora_grpo"))
    assert by_folder.weights < 1e6 and 8.1e9 < by_name.weights < 8.2e9
    cache = tmp_path / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    (cache / "snapshots" / ("0" * 40)).mkdir(parents=True)
    text = (Path(quickstart.model.path) / "config.json").read_text()
    (cache / "snapshots" / ("0" * 40) / "config.json").write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_shapes(changed(quickstart, {"model.path": "someone/small"})) == by_folder
    with pytest.raises(ConfigError, match=r"the hub gives no config\.json"):
        model_shapes(changed(quickstart, {"model.path": "someone/unknown"}))


def test_slots_have_the_ranks_that_vllm_serves() -> None:
    """The plan's table of ranks and of a step's tokens are those of the engine's own arguments."""
    pytest.importorskip("vllm")
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    from actors.vllm_engine import arguments
    from tora.launch import memory
    from tora.plan import engine

    assert get_args(MaxLoRARanks) == memory.SLOT_RANKS
    assert arguments._BATCHED_TOKENS == engine.BATCHED_TOKENS
