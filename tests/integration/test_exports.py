"""`tora export` and `tora eval` of real runs: every checkpoint as an adapter and as a merged model, whose log-probs are
those of the policy; folders, tables and refusals."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import shake
from datasets import load_dataset
from decoders import packed_logits, random_sequences
from peft import PeftModel
from peft_reference import VisionReference
from runs import train
from safetensors.torch import load_file
from tiny import make_text_model, make_vl_model, picture
from transformers import AutoModelForCausalLM, AutoTokenizer
from vision_inputs import hugging_face_inputs
from vision_learners import vl_config

from learner.learner import Learner
from tora.adapters.merge import merge
from tora.cli import main
from tora.config.load import load_config
from tora.launch.policies import export_merged, load_policy
from tora.run.target import Target, find

HERE = ["async_rl=false", "rollout.engine=torch"]
CPU = torch.device("cpu")
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three short runs of the quick-start: LoRA, DoRA over an NF4 base, and all weights."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"lora": ["lora"], "qdora": ["dora_cache", "model.quantize_base=true"], "full": ["full"]}
    for name, (lora_type, *more) in kinds.items():
        more += ["eval.keep_best=true", "eval.samples=2", "eval.num_prompts=4", "num_steps=3"]
        train("quickstart", folder / name, *HERE, f"model.lora_type={lora_type}", *more)
    return {name: folder / name for name in kinds}


@pytest.fixture(scope="module")
def merged(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The last policies of the runs with an adapter, merged in float32."""
    folder = tmp_path_factory.mktemp("merged")
    for name in ("lora", "qdora"):
        assert main(["export", str(runs[name]), "--merge", "--dtype", "fp32", "--to", str(folder / name)]) == 0
    return {name: folder / name for name in ("lora", "qdora")}


@torch.no_grad()
def their_logits(model: Any) -> torch.Tensor:
    return torch.cat([model(s[None]).logits[0] for s in random_sequences(9, 21)]).float()


@cache
def logits_of(run: Path, checkpoint: str | None = None) -> torch.Tensor:
    return policy_logits(find(str(run), checkpoint=checkpoint))


@torch.no_grad()
def policy_logits(target: Target) -> torch.Tensor:
    return packed_logits(load_policy(target, CPU), random_sequences(9, 21)).float()


def merged_logits(folder: Path) -> torch.Tensor:
    AutoTokenizer.from_pretrained(folder)
    return their_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("checkpoint", ["2", "3", "best", None])
def test_a_checkpoint_is_exported_as_an_adapter(runs: dict[str, Path], tmp_path: Path, checkpoint: str | None) -> None:
    chosen = [] if checkpoint is None else ["--checkpoint", checkpoint]
    assert main(["export", str(runs["lora"]), *chosen, "--to", str(tmp_path / "out")]) == 0
    base = AutoModelForCausalLM.from_pretrained(load_config("quickstart").model.path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    expected = logits_of(runs["lora"], checkpoint)
    torch.testing.assert_close(their_logits(adapted), expected, atol=TOLERANCE, rtol=1e-4)
    with adapted.disable_adapter():
        assert (their_logits(adapted) - expected).abs().max() > 10 * TOLERANCE, "the adapter has a visible effect"


def test_checkpoints_differ(runs: dict[str, Path]) -> None:
    two, three = (logits_of(runs["lora"], step) for step in ("2", "3"))
    assert (two - three).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["lora", "qdora"])
def test_a_merged_model_is_the_policy(runs: dict[str, Path], merged: dict[str, Path], name: str) -> None:
    """NF4 too: what is merged into are the weights that the policy was trained on."""
    torch.testing.assert_close(merged_logits(merged[name]), logits_of(runs[name]), atol=TOLERANCE, rtol=1e-4)
    assert not (merged[name] / "adapter_config.json").exists()
    assert json.loads((merged[name] / "config.json").read_text())["dtype"] == "float32"


def test_merging_keeps_the_dtype_of_the_base_and_reports_the_rounding(
    runs: dict[str, Path], merged: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs["lora"]), "--merge", "--to", str(tmp_path / "out")]) == 0
    base = load_file(Path(load_config("quickstart").model.path) / "model.safetensors")
    rounded, exact = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", merged["lora"]))
    assert {n: t.dtype for n, t in rounded.items()} == {n: t.dtype for n, t in base.items()}
    touched = [name for name in base if name.endswith("_proj.weight")]
    rounding = sum((rounded[n].float() - exact[n]).double().square().sum().item() for n in touched) ** 0.5
    update = sum((exact[n] - base[n].float()).double().square().sum().item() for n in touched) ** 0.5
    assert f"{rounding / update:.2%} of the adapter's own update" in capsys.readouterr().out
    assert all(torch.equal(rounded[n], base[n]) for n in base if n not in touched)


def test_a_run_of_all_weights_is_exported_whole(runs: dict[str, Path], tmp_path: Path) -> None:
    assert not (runs["full"] / "adapter").exists() and (runs["full"] / "best/config.json").is_file()
    for checkpoint in (["--checkpoint", "2"], []):
        out = tmp_path / "-".join(["out", *checkpoint])
        assert main(["export", str(runs["full"]), *checkpoint, "--to", str(out)]) == 0
        target = find(str(runs["full"]), checkpoint=checkpoint[-1] if checkpoint else None)
        torch.testing.assert_close(merged_logits(out), policy_logits(target), atol=TOLERANCE, rtol=1e-4)
        assert "| trained | all weights |" in (out / "README.md").read_text()


def test_a_merged_vision_model_is_the_policy(tmp_path: Path) -> None:
    """Adapters in the tower and in the decoder, over a base in one file and over one in several."""
    folder = make_vl_model(tmp_path / "model")
    learner = Learner(vl_config(folder, "dora", "lora"))
    shake(learner.model)
    learner.export(tmp_path / "adapter")
    reference = VisionReference(folder, tower=False)
    images = (picture(64, 64),)
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    ids = torch.tensor([reference.processor.encode([{"role": "user", "content": content}], images)])
    inputs = hugging_face_inputs(reference.processor, ids, images)
    theirs = PeftModel.from_pretrained(reference.model("base"), str(tmp_path / "adapter")).eval()
    layers = sum(name.endswith(".lora_A") for name, _ in theirs.named_modules())
    assert export_merged(find(str(tmp_path / "adapter")), tmp_path / "merged").num_modules == layers > 21
    merged = VisionReference(tmp_path / "merged", tower=False).model("base")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, theirs(**inputs).logits, atol=TOLERANCE, rtol=1e-4)


def test_a_base_in_several_files_is_merged_file_by_file(tmp_path: Path) -> None:
    whole = make_text_model(tmp_path / "whole", tied=False)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    a, b = torch.randn(2, 128), torch.randn(128, 2)
    name = "model.layers.1.self_attn.o_proj"
    adapters = {name: {".lora_A.weight": a, ".lora_B.weight": b}}
    report = merge(tmp_path / "shards", tmp_path / "out", adapters=adapters, weights={})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    expected = model.state_dict()
    expected[f"{name}.weight"] = expected[f"{name}.weight"] + b @ a
    assert merged.keys() == expected.keys()
    for key in merged:
        torch.testing.assert_close(merged[key], expected[key])
    assert report.num_modules == 1 and report.update == pytest.approx((b @ a).norm().item(), rel=1e-5)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_the_model_card_has_settings_results_and_curve_but_no_path(runs: dict[str, Path], tmp_path: Path) -> None:
    assert main(["export", str(runs["qdora"]), "--checkpoint", "2", "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    for text in ("library_name: peft", "| trained | dora_cache, rank 1, alpha 32, NF4 base |", "reward_curve.png"):
        assert text in card
    assert "| held-out | step 0 | step 2 |" in card and "original weights" in card
    assert (tmp_path / "out/reward_curve.png").is_file()
    assert "/" + "home" not in card and str(tmp_path) not in card and str(runs["qdora"].parent) not in card


REFUSED = [
    (["export", "{lora}", "--checkpoint", "7"], "--checkpoint=7 is not one of "),
    (["export", "{lora}", "--dtype", "bf16"], "needs --merge"),
    (["export", "{full}", "--merge"], "trains all weights, so there is no adapter to merge"),
    (["export", "{lora}", "--private"], "--private needs --push"),
    (["export", "{lora}", "--push", "a/b/c"], "--push=a/b/c is not the name of a repository"),
    (["export", "{lora}", "--to", "{lora}"], "exists; name another folder"),
    (["export", "{tmp}"], "is neither a run"),
    (["export", "{base}"], "nothing to export"),
    (["eval", "{lora}", "--checkpoint", "x"], "--checkpoint=x is not one of "),
    (["eval", "{base}"], "has no held-out set"),
    (["eval", "{base}", "--dataset", "tora.tasks.sums.sums"], "its rewards are not known"),
    (["eval", "{base}", "--checkpoint", "1"], "needs the folder of a run"),
    (["eval", "{lora}", "--dataset", "nothing"], "is no file, no name on the hub"),
    (["eval", "{lora}", "--dataset", "no.jsonl"], "does not exist"),
    (["eval", "{lora}", "--dataset", "tora.tasks.sum.sums"], "does not exist"),
    (["eval", "{lora}", "--reward", "tora.rewards.answer_tagg"], "the nearest is tora.rewards.answer_tag"),
    (["eval", "{lora}", "--samples", "0"], "--samples=0 must be at least 1"),
    (["eval", "{lora}", "--num-prompts", "-1"], "--num-prompts=-1 must be at least 1"),
    (["eval", "{lora}", "--greedy", "--samples", "4"], "--greedy gives the same rollout"),
    (["eval", "{lora}", "--pass-at-least", "nan"], "--pass-at-least=nan must be a finite number"),
    (["eval", "{lora}", "--out", "{lora}"], "is not empty"),
    (["eval", "{lora}", "eval.nothing=1"], "Unknown key eval.nothing=1"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_a_wrong_command_is_refused_in_a_sentence(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {**runs, "tmp": tmp_path / "empty", "base": load_config("quickstart").model.path}
    before = sorted(runs["lora"].parent.rglob("*"))
    assert main([word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.endswith((".\n", "\n"))
    assert sorted(runs["lora"].parent.rglob("*")) == before and not list((tmp_path / "empty").iterdir())


@pytest.mark.usefixtures("datasets_cache")
def test_an_evaluation_writes_tables_that_filter_a_dataset(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["eval", str(runs["lora"]), "--checkpoint", "best", "--engine", "torch", "--num-prompts", "12", "--json"]
    assert main([*words, "--samples", "4", "seed=3"]) == 0
    result = json.loads(capsys.readouterr().out)
    completions = load_dataset("parquet", data_files=result["completions"], split="train")
    assert len(completions) == 12 * 4 and {"prompt", "completion", "reward/answer_tag"} <= set(completions.column_names)
    assert np.mean(completions["reward"]) == pytest.approx(result["reward"]) == pytest.approx(result["pass@1"])
    low, high = result["intervals"]["reward"]
    assert low <= result["reward"] <= high and low < high
    rates = load_dataset("parquet", data_files=result["prompts"], split="train")["pass_rate"]
    assert len(rates) == 12 and np.mean(rates) == pytest.approx(result["accuracy"])
    one_of_four = np.mean([rate > 0 for rate in rates])
    assert result["pass@4"] == pytest.approx(one_of_four)
    kept = [f"eval.dataset={{_component_: tora.tasks.dataset.file_dataset, path: {result['prompts']}, keep: 0.2..0.8}}"]
    assert main([*words, "--out", "again", *kept]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["num_prompts"] == sum(0.2 <= rate <= 0.8 for rate in rates) > 0


def test_an_adapter_a_merged_model_and_its_run_score_the_same(
    runs: dict[str, Path],
    merged: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(runs["lora"]), "--to", "adapter"]) == 0
    scores, config = [], ["--config", "quickstart"]
    for words in ([str(runs["lora"])], [str(merged["lora"]), *config], ["adapter", *config]):
        capsys.readouterr()
        assert main(["eval", *words, "--greedy", "--engine", "torch", "--num-prompts", "16", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["reward"])
    assert len(set(scores)) == 1, scores


@pytest.mark.slow
def test_vllm_scores_a_run_as_the_torch_engine_does(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.chdir(tmp_path)
    scores = []
    for engine in ("torch", "vllm"):
        words = ["eval", str(runs["lora"]), "--greedy", "--engine", engine, "--num-prompts", "16", "--json"]
        assert main([*words, "--out", engine]) == 0
        scores.append({k: v for k, v in json.loads(capsys.readouterr().out).items() if isinstance(v, float)})
    assert scores[0] == pytest.approx(scores[1]) and scores[0]["reward"] >= 0
