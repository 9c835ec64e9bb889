"""The decoder of every model family against transformers in float32."""

import json
import subprocess
import sys
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
from decoders import CPU, packed_logits, random_sequences
from safetensors.torch import load_file, save_file
from tiny import make_text_model
from transformers import AutoModelForCausalLM

from tora.errors import ConfigError
from tora.models.attention import CachedAttention, PrefillAttention
from tora.models.load import load_decoder
from tora.models.names import Names

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "qwen3 tied": {"family": "qwen3", "tied": True},
    "qwen3 untied": {"family": "qwen3", "tied": False},
    "qwen3 biased": {"family": "qwen3", "attention_bias": True},
    "qwen2 tied": {"family": "qwen2", "tied": True},
    "qwen2 untied": {"family": "qwen2", "tied": False},
    "llama untied": {"family": "llama", "tied": False},
    "llama tied, scaled rotary": {"family": "llama", "tied": True, "rope_parameters": LLAMA3_ROPE},
    "llama biased": {"family": "llama", "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("case", CASES)
def test_packed_logits_equal_hugging_face(tmp_path: Path, case: str) -> None:
    folder = make_text_model(tmp_path, **CASES[case])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_decoder(folder, dtype=torch.float32, device=CPU)
    sequences = random_sequences(7, 150, 1, 33)
    with torch.no_grad():
        expected = torch.cat([reference(s[None]).logits[0] for s in sequences])
        torch.testing.assert_close(packed_logits(ours, sequences), expected, atol=1e-4, rtol=1e-5)


def test_cached_decode_equals_the_packed_forward(tmp_path: Path) -> None:
    model = load_decoder(make_text_model(tmp_path), dtype=torch.float32, device=CPU)
    prompts, tails = random_sequences(5, 9), random_sequences(4, 4, 4)
    rows = torch.tensor([0, 1, 1])  # the second prompt has two rollouts
    with torch.no_grad():
        lengths = torch.tensor([5, 9])
        prefill = PrefillAttention(lengths)
        positions = torch.cat([torch.arange(5), torch.arange(9)])
        model(torch.cat(prompts)[None], positions=positions[None], attend=prefill)
        cache = CachedAttention(prefill, lengths[rows], rows)
        decoded = []
        for i in range(4):
            tokens = torch.stack([t[i] for t in tails])[:, None]
            decoded.append(model.output(model(tokens, positions=cache.lengths_B[:, None], attend=cache))[:, 0])
            cache.advance()
            if i == 1:  # the middle row leaves
                cache.keep(torch.tensor([0, 2]))
                tails = [tails[0], tails[2]]
        whole = [packed_logits(model, [torch.cat([prompts[p], t])]) for p, t in zip([0, 1], tails, strict=True)]
    torch.testing.assert_close(decoded[0][0], whole[0][5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack([d[0] for d in decoded]), whole[0][5:9], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack([d[-1] for d in decoded]), whole[1][9:13], atol=1e-4, rtol=1e-4)


def test_sharded_folder_loads_like_a_single_file(tmp_path: Path) -> None:
    single = make_text_model(tmp_path / "single", tied=False)
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    a, b = (load_decoder(f, dtype=torch.float32, device=CPU).state_dict() for f in (single, sharded))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_take_the_runs_dtype_and_norms_stay_float32(tmp_path: Path) -> None:
    model = load_decoder(make_text_model(tmp_path), dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for name, p in model.named_parameters() if "norm" not in name} == {torch.bfloat16}
    assert {p.dtype for name, p in model.named_parameters() if "norm" in name} == {torch.float32}
    assert model.rope.inverse_frequency.dtype == torch.float32


def test_names_map_both_ways(tmp_path: Path) -> None:
    names = Names()
    for name in load_file(make_text_model(tmp_path, "qwen2", tied=False) / "model.safetensors"):
        ours = names.parameter_from_hf(name)
        assert ours is not None and names.parameter_to_hf(ours) == name
    assert names.parameter_from_hf("model.visual.patch_embed.weight") is None


def _break_missing(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _break_extra(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(1)


def _break_shape(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = torch.zeros(3)


def _break_family(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["model_type"] = "no_such_model"


def _break_window(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["layer_types"] = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_break_missing, "lacks 1 tensors"),
        (_break_extra, "does not belong"),
        (_break_shape, "has shape"),
        (_break_family, "'no_such_model' .* is not known to transformers"),
        (_break_window, "sliding-window"),
    ],
)
def test_an_incompatible_folder_is_refused(tmp_path: Path, damage: Any, words: str) -> None:
    folder = make_text_model(tmp_path)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        load_decoder(folder, dtype=torch.float32, device=CPU, implementation="native")


def test_bin_files_are_refused_with_a_command_that_converts_them(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "base", "llama", dtype=torch.float16)
    expected = load_decoder(folder, dtype=torch.float32, device=CPU).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="which can run code as they are read") as refusal:
        load_decoder(folder, dtype=torch.float32, device=CPU)
    command = str(refusal.value).partition("convert them with ")[2]
    words = [
        word.replace("NEW_FOLDER", str(tmp_path / "new")).replace("FOLDER", str(folder)) for word in split(command)
    ]
    subprocess.run([sys.executable, *words[1:]], check=True)
    converted = load_decoder(tmp_path / "new", dtype=torch.float32, device=CPU).state_dict()
    assert expected.keys() == converted.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items()), "float16 survives"
