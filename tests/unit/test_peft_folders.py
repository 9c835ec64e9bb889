"""Folders that PEFT has written: each field of its config is computed as PEFT does, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import build, model_config
from decoders import packed_logits, random_sequences
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import LINEARS, make_text_model
from transformers import AutoModelForCausalLM

from tora.adapters.inject import adapter_layers
from tora.adapters.peft_config import NO_EFFECT, READ, REFUSED, read_peft_config
from tora.adapters.peft_format import peft_config, peft_tensors, save_peft
from tora.adapters.targets import adapter_shapes
from tora.config.schema import ALL_LINEAR
from tora.errors import ConfigError
from tora.models.load import load_decoder

RANK, ALPHA = 4, 10.0
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\.up_proj": 7},
    "alpha_pattern": {"down_proj": 3.0, "layers.0.self_attn.q_proj": 5},
}
REGEX = r".*layers\.[01]\.(self_attn\.[qv]_proj|mlp\.up_proj)"
LAYER_1 = r".*layers\.1\..*\.(q_proj|up_proj)"
MOST = [name for name in LINEARS if name not in ("down_proj", "o_proj")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("base"), "qwen2")


def peft_folder(base: Path, folder: Path, **fields: Any) -> Path:
    """An adapter with random tensors, written by PEFT."""
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.2 * noise) if "magnitude" in name else parameter.copy_(0.1 * noise)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def peft_logits(base: Path, folder: Path, dtype: str = "fp32") -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    return torch.cat([adapted(s[None]).logits[0] for s in random_sequences(9, 21)]).float()


@torch.no_grad()
def our_logits(model: Any) -> torch.Tensor:
    return packed_logits(model, random_sequences(9, 21)).float()


def edit(folder: Path, **fields: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "patterns": (PATTERNS, {}),
    "patterns, rsLoRA": ({**PATTERNS, "use_rslora": True}, {"use_rslora": True}),
    "patterns, DoRA": ({**PATTERNS, "use_dora": True}, {"lora_type": "dora_cache"}),
    "regex": ({"target_modules": REGEX}, {"lora_targets": REGEX}),
    "all-linear": ({"target_modules": "all-linear"}, {"lora_targets": ALL_LINEAR}),
    "dotted": ({"target_modules": ["mlp.up_proj", "q_proj"]}, {"lora_targets": ["mlp.up_proj", "q_proj"]}),
    "excluded": ({"exclude_modules": ["down_proj", "o_proj"]}, {"lora_targets": MOST}),
    "excluded by regex": (
        {"exclude_modules": r".*layers\.0\..*", "target_modules": ["q_proj", "up_proj"]},
        {"lora_targets": LAYER_1},
    ),
    "layers": ({"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}, {"lora_targets": LAYER_1}),
    "one layer": (
        {"layers_to_transform": 1, "layers_pattern": "layers", "target_modules": ["q_proj", "up_proj"]},
        {"lora_targets": LAYER_1},
    ),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}),
    "eva": ({"init_lora_weights": "eva"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_folder_computes_what_peft_computes(tmp_path: Path, base: Path, case: str) -> None:
    fields, changes = CASES[case]
    folder = peft_folder(base, tmp_path / "adapter", **fields)
    cfg = model_config(base, **{"lora_type": "lora", "adapter_path": str(folder), **changes})
    ours, expected = build(cfg), peft_logits(base, folder)
    torch.testing.assert_close(our_logits(ours), expected, atol=1e-4, rtol=1e-5)
    save_peft(peft_tensors(ours), peft_config(ours, cfg), tmp_path / "again")
    torch.testing.assert_close(peft_logits(base, tmp_path / "again"), expected, atol=1e-4, rtol=1e-5)
    cfg.adapter_path = str(tmp_path / "again")
    torch.testing.assert_close(our_logits(build(cfg)), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("lora_type", ["lora", "dora"])
def test_a_folder_computes_what_peft_computes_in_bf16(tmp_path: Path, base: Path, lora_type: str) -> None:
    """As near to float32 as PEFT's own bf16."""
    folder = peft_folder(base, tmp_path, **PATTERNS, use_dora=lora_type == "dora")
    ours = build(model_config(base, lora_type, adapter_path=str(folder)), torch.bfloat16)
    exact, theirs = peft_logits(base, folder), peft_logits(base, folder, "bf16")
    error, bf16_alone = (our_logits(ours) - exact).abs().mean(), (theirs - exact).abs().mean()
    assert 0 < error < 1.5 * bf16_alone


@pytest.mark.parametrize(
    "targets", [ALL_LINEAR, REGEX, LAYER_1, ["q_proj"], ["mlp.up_proj", "v_proj"], ["model.layers.1.mlp.gate_proj"]]
)
def test_a_config_selects_the_layers_that_peft_selects(base: Path, targets: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    ours = build(model_config(base, "lora", lora_targets=targets))
    assert set(adapter_layers(ours)) == set(theirs.targeted_module_names)


def test_a_pattern_that_matches_nothing_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.lora_targets=layers.*_proj matches no linear layer, such as model"):
        build(model_config(base, "lora", lora_targets="layers.*_proj"))


def test_every_field_of_pefts_config_is_in_one_table() -> None:
    tables = [set(READ), set(NO_EFFECT), set(REFUSED)]
    assert set.union(*tables) == {field.name for field in dataclasses.fields(LoraConfig)}
    assert sum(map(len, tables)) == len(set.union(*tables))


WITHOUT_EFFECT: dict[str, Any] = {
    "task_type": "SEQ_2_SEQ_LM",
    "auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers", "unsloth_fixed": True},
    "peft_version": "0.9.0",
    "base_model_name_or_path": "another/model",
    "revision": "main",
    "inference_mode": False,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "megatron_core": "megatron",
    "lora_dropout": 0.5,
    "fan_in_fan_out": True,
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArBr"},
    "qalora_group_size": 8,
    "ensure_weight_tying": True,
}


def test_fields_without_effect_have_none(tmp_path: Path, base: Path) -> None:
    """Neither in PEFT, where it accepts them in a file, nor in ours."""
    assert WITHOUT_EFFECT.keys() == NO_EFFECT
    folder = peft_folder(base, tmp_path)
    expected = peft_logits(base, folder)
    edit(folder, **{name: value for name, value in WITHOUT_EFFECT.items() if name != "runtime_config"})
    torch.testing.assert_close(peft_logits(base, folder), expected, atol=0, rtol=0)
    edit(folder, **WITHOUT_EFFECT)
    ours = build(model_config(base, "lora", adapter_path=str(folder)))
    torch.testing.assert_close(our_logits(ours), expected, atol=1e-4, rtol=1e-5)


OTHERS: dict[str, Any] = {
    "lora_bias": True,
    "trainable_token_indices": [3, 5],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"num_layers": 2},
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 32},
}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, f"has {name}=.*, which Tora does not support") for name, value in OTHERS.items()),
    *(
        ({"init_lora_weights": init}, f"has init_lora_weights={init}, which changes the base's .*path_initial_model")
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga")
    ),
    *(({"init_lora_weights": init}, "has init_lora_weights=.*, which is no plain LoRA") for init in ("loftq", "mica")),
    ({"bias": "all"}, 'has bias="all": trained biases'),
    ({"bias": "lora_only"}, 'has bias="lora_only": trained biases'),
    ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\]"),
    ({"use_something_new": 3}, "has use_something_new=3, which Tora does not know"),
    ({"peft_type": "LOHA"}, 'has peft_type="LOHA", and only LORA'),
    ({"target_modules": None}, "has no target_modules"),
    ({"target_modules": ".*_proj", "layers_to_transform": [1]}, "has layers_to_transform beside"),
    ({"target_modules": ["q_proj"]}, r"has tensors for .*v_proj, which its own target_modules leave out"),
    ({"r": 5}, "has r=5, and model.lora_rank makes it 4"),
    ({"r": "many"}, "is no adapter config of PEFT: ValueError"),
    ({"lora_alpha": 11}, "has lora_alpha=11.0, and model.lora_alpha makes it 10.0"),
    ({"lora_alpha": float("nan")}, "has lora_alpha=nan"),
    ({"use_rslora": True}, "has use_rslora=True"),
    ({"use_dora": True}, "has use_dora=True, and model.lora_type makes it False"),
    ({"rank_pattern": {"q_proj": 9}}, r"q_proj.lora_A.weight' .* has shape \(4, 128\), .* ask for \(9, 128\)"),
]


@pytest.fixture(scope="module")
def small(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_folder(base, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "v_proj"])


def copy_of(folder: Path, target: Path, **fields: Any) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    return edit(target, **fields)


def load(base: Path, folder: Path) -> Any:
    return build(model_config(base, "lora", adapter_path=str(folder), lora_targets=["q_proj", "v_proj"]))


def test_every_refused_field_is_tried() -> None:
    assert OTHERS.keys() == REFUSED.keys()


@pytest.mark.parametrize(("fields", "words"), REFUSALS, ids=lambda value: str(value)[:40])
def test_a_folder_that_would_be_computed_otherwise_is_refused_by_name(
    tmp_path: Path, base: Path, small: Path, fields: dict[str, Any], words: str
) -> None:
    folder = copy_of(small, tmp_path, **fields)
    with pytest.raises(ConfigError, match=words):
        load(base, folder)


RENAMES: dict[str, Any] = {
    "the adapter's name": lambda n: n.replace(".weight", ".default.weight"),
    "torch.compile": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda n: n.replace("self_attn", "_fsdp_wrapped_module.self_attn._fsdp_wrapped_module"),
    "DDP": lambda n: f"module.{n}",
    "no prefix": lambda n: n.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("rename", RENAMES)
def test_names_that_wrappers_leave_are_understood(tmp_path: Path, base: Path, small: Path, rename: str) -> None:
    folder = copy_of(small, tmp_path)
    tensors = load_file(small / "adapter_model.safetensors")
    save_file({RENAMES[rename](name): t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    assert torch.equal(our_logits(load(base, folder)), our_logits(load(base, small)))


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, base: Path, small: Path) -> None:
    folder, tensors = copy_of(small, tmp_path), load_file(small / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    for damaged, words in (
        ({**tensors, first: tensors[first] * float("nan")}, f"{first}.* not finite"),
        ({n.replace("model.layers", "language_model.layers"): t for n, t in tensors.items()}, "differ in 16 tensors"),
        ({**tensors, first.replace(".weight", ".default.weight"): tensors[first].clone()}, "twice"),
        ({n: t for n, t in tensors.items() if n != first}, f"differ in 1 tensors, e.g. '{first}', which only this run"),
        ({**tensors, "base_model.model.lm_head.lora_A.weight": tensors[first]}, "lm_head.* which only the adapter has"),
    ):
        save_file({n: t.clone() for n, t in damaged.items()}, folder / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=words):
            load(base, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        ConfigError, match=r"holds no adapter_model.safetensors; other .* not read; PEFT reads its adapter_model.bin"
    ):
        load(base, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is no adapter config of PEFT"):
        load(base, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no adapter_config.json"):
        load(base, folder)


def test_the_largest_rank_counts_patterns(tmp_path: Path, base: Path) -> None:
    folder = peft_folder(base, tmp_path, **PATTERNS)
    assert read_peft_config(folder).max_rank == 7
    cfg = model_config(base, "lora")
    model = load_decoder(base, dtype=torch.float32, device=torch.device("cpu"))
    shapes = adapter_shapes(model, cfg, read_peft_config(folder))
    assert {shape.rank for shape in shapes.values()} == {2, 4, 7}


@pytest.mark.parametrize("alpha", [1 / 3, 10.0, 1e-7])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_config_without_patterns_is_written_without_them(base: Path, alpha: float, use_rslora: bool) -> None:
    """Although alpha is computed from a scaling that was rounded."""
    cfg = dataclasses.replace(model_config(base, "lora", use_rslora=use_rslora), lora_alpha=alpha, lora_rank=7)
    written = peft_config(build(cfg), cfg)
    assert written["rank_pattern"] == written["alpha_pattern"] == {} and written["lora_alpha"] == alpha
