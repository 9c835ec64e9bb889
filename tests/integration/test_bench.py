"""The benchmarks run and write the promised rows; the speeds themselves are not checked."""

import json
from pathlib import Path

import pytest
from adapters import build, model_config

from tora.bench.implementations import main as compare_implementations
from tora.bench.measure import shapes_of
from tora.bench.rows import Samples, Setting, make_row, ratio
from tora.bench.shapes import shape_names, write_random_model
from tora.cli import main
from tora.config.load import config_names
from tora.errors import ConfigError


def test_table_measures_every_setting_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tokens", "64", "--sequence", "16", "--rows", "2", "--new-tokens", "2", "--rounds", "1"]
    assert main(["bench", "table", *small, "--compile", "no", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 7
    for row in rows:
        assert all(row[key] > 0 for key in ("seconds_per_step", "tokens_per_s", "peak_gib")), row
        assert row["compile"] is False
        assert (row["lora_type"], row["quantize_base"]) != ("lora", False) or row["ratio_to_lora"] == 1.0
    assert "qdora_cache" in capsys.readouterr().out


def test_a_vision_model_is_measured_with_an_image(tmp_path: Path) -> None:
    small = ["--tokens", "64", "--sequence", "16", "--rows", "2", "--new-tokens", "2", "--rounds", "1"]
    words = ["bench", "table", *small, "--image", "96", "--compile", "no", "--only", "lora,qdora_cache"]
    assert main([*words, "--config", "tiny_vl", "--json", str(tmp_path / "rows.json")]) == 0
    assert all(
        row["seconds_per_step"] > 0 < row["tokens_per_s"] for row in json.loads((tmp_path / "rows.json").read_text())
    )
    assert main([*words, "--config", "tiny"]) == 2, "a text model takes no image"


def test_sync_measures_an_engine(tmp_path: Path) -> None:
    words = ["bench", "sync", "--rounds", "2", "--rows", "2", "--rank", "4", "--dtype", "fp32"]
    updates = ["between_rollouts", "in_flight_recompute_kv"]
    words += ["--only", ",".join(updates)]
    assert main([*words, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    syncs, speeds = [r for r in rows if "stall_ms" in r], [r for r in rows if "ratio" in r]
    assert [(r["update"], r["lora_type"]) for r in syncs] == [(u, k) for u in updates for k in ("lora", "dora")]
    assert 0 < syncs[0]["nbytes"] < syncs[1]["nbytes"]
    for row in syncs:
        assert 0 < row["stall_ms"][0] <= row["stall_ms"][1] and row["install_ms"] > row["stall_ms"][0]
        assert row["copy_ms"][0] > 0 and row["tokens_per_s"] > 0
    assert [r["lora_type"] for r in speeds] == ["lora", "dora"] and all(r["ratio"] > 0 for r in speeds)


def test_the_two_implementations_of_a_model_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    compare_implementations(["--shapes", "tiny", "--tokens", "256"])
    said = capsys.readouterr().out
    assert said.startswith("tiny, float32, 256 tokens") and said.count(" s, ratio ") == 2


def test_only_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "learner", "--only", "lora,qora"]) == 2
    assert "--only qora: bench learner has full, lora, dora, dora_cache, qlora" in capsys.readouterr().err
    assert main(["bench", "sync", "--only", "lora"]) == 2


def test_ratios_compare_rounds_in_pairs() -> None:
    assert ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    lora, dora = Setting("lora", True), Setting("dora", True)
    samples = {lora: Samples([1.0, 2.0], [10.0, 10.0], [1, 3]), dora: Samples([1.5, 3.0], [5.0, 5.0], [2, 2])}
    row = make_row(dora, samples)
    assert (row.ratio_to_lora, row.tokens_ratio_to_lora, row.ratio_to_unquantized) == (1.5, 0.5, None)


def test_every_configs_model_has_shapes() -> None:
    of_transformers = {"gemma3", "mistral", "phi4", "qwen2_5_vl", "qwen3_5", "qwen3_moe", "smollm3"}
    # random weights are made of native models
    named = {shapes_of(name) for name in config_names() if "/" in name and name.split("/")[0] not in of_transformers}
    assert named and named <= set(shape_names())
    with pytest.raises(ConfigError, match=r"the nearest is qwen3/4B"):
        write_random_model("qwen3/4b", Path("unused"), dtype="bfloat16")


def test_random_weights_load_like_any_model(tmp_path: Path) -> None:
    write_random_model("tiny", tmp_path, dtype="float32")
    assert sum(p.numel() for p in build(model_config(tmp_path, "lora")).parameters()) > 1e6
