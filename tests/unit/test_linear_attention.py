"""Layers that carry a state: documents of a packed row, and rows of the torch engine, keep to their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import shake
from decoders import CPU, packed_logits, random_sequences
from families import make_family
from learners import config
from safetensors.torch import load_file, save_file
from torch_engines import engine_of
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from learner.learner import Learner
from tora.bench.families import LINEAR_ATTENTION, SIZES, randomize
from tora.bench.models import packed_gap, torch_gap
from tora.bench.vision_families import write_vision_family
from tora.cli import main
from tora.config.schema import ALL_LINEAR, RolloutConfig, RunConfig
from tora.errors import ConfigError
from tora.launch.memory import model_shapes
from tora.launch.servable import vllm_gap, with_served_model
from tora.models.attention import CachedAttention, PrefillAttention
from tora.models.generic import GenericDecoder
from tora.models.load import load_decoder
from tora.models.recurrence import DocumentRows
from tora.models.shared_prefix import SharedPrefixAttention
from tora.plan.transformers_shapes import TransformersShapes
from tora.types import SampleRequest, Sampling

REWARDS = [{"_component_": "tora.rewards.format"}]
LENGTHS = (1, 70, 2, 5, 64, 33)
"""Shorter and longer than the convolution's kernel and than a chunk of 64 tokens, and just as long."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5")


@pytest.fixture(scope="module")
def model(folder: Path) -> GenericDecoder:
    model = load_decoder(folder, dtype=torch.float32, device=CPU)
    assert isinstance(model, GenericDecoder) and model.recurrent == {0}
    return model


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of the largest logit; a leak between documents changes them by a tenth."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def adapted(folder: Path, **model: Any) -> Learner:
    learner = Learner(config(folder, "dora_cache", model={"lora_targets": ALL_LINEAR, **model}))
    shake(learner.model)
    return learner


def test_packed_documents_are_what_single_ones_are(model: GenericDecoder, theirs: Any) -> None:
    documents = random_sequences(*LENGTHS)
    with torch.no_grad():
        packed = packed_logits(model, documents).split(LENGTHS)
        for document, ours in zip(documents, packed, strict=True):
            same(ours, packed_logits(model, [document]))
            same(ours, theirs(document[None]).logits[0])


def test_gradients_of_packed_documents_are_the_sums_of_single_ones(folder: Path) -> None:
    learner = adapted(folder)
    documents = random_sequences(*LENGTHS)
    weights = torch.linspace(-1, 1, 320)

    def gradients(groups: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        learner.model.zero_grad()
        for group in groups:
            (packed_logits(learner.model, group).log_softmax(1) * weights).sum().backward()
        return {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}

    packed, single = gradients([documents]), gradients([[document] for document in documents])
    assert packed.keys() == single.keys() and any("linear_attn.in_proj_a" in name for name in packed)
    for name, expected in single.items():
        assert (packed[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_a_documents_neighbours_change_nothing(model: GenericDecoder) -> None:
    a, b, c = random_sequences(20, 20, 20)
    with torch.no_grad():
        after_a, after_c = (packed_logits(model, [x, b, x])[20:40] for x in (a, c))
    assert torch.equal(after_a, after_c)


def test_completions_continue_from_their_shared_prompt(model: GenericDecoder) -> None:
    lengths, tails, prompt_of = (66, 3), (2, 70, 5), (0, 0, 1)
    ids = random_sequences(*lengths, *tails)
    starts = [0, 0, *(lengths[p] for p in prompt_of)]
    positions = torch.cat([start + torch.arange(len(x)) for start, x in zip(starts, ids, strict=True)])
    attend = SharedPrefixAttention(torch.tensor(lengths), torch.tensor(tails), torch.tensor(prompt_of))
    with torch.no_grad():
        hidden = model(torch.cat(ids)[None], positions=positions[None], attend=attend)[0]
        prompts, found = hidden[: sum(lengths)].split(lengths), hidden[sum(lengths) :].split(tails)
        for prompt, number in zip(prompts, range(2), strict=True):
            same(model.logits(prompt), packed_logits(model, [ids[number]]))
        for own, number, tail in zip(found, prompt_of, ids[2:], strict=True):
            whole = packed_logits(model, [torch.cat([ids[number], tail])])[lengths[number] :]
            same(model.logits(own), whole)


def test_rows_hold_each_token_once_and_prefixes_again() -> None:
    rows = DocumentRows(*(torch.tensor(x) for x in ([0, 2, 5], [2, 3, 1], [0, 0, 2], [0, 0, 3])))
    seen: list[Any] = []

    def doubled(x: torch.Tensor, *, mask_RL: torch.Tensor | None, cache: Any) -> torch.Tensor:
        assert mask_RL is not None and cache is None
        seen.append([row[mask].flatten().tolist() for row, mask in zip(x, mask_RL, strict=True)])
        return 2 * x

    tokens = torch.arange(6.0)[None, :, None]
    assert torch.equal(rows(doubled, tokens), 2 * tokens)
    assert seen == [[[0, 1], [2, 3, 4], [2, 3, 4, 5]]]


def test_rows_that_decode_have_the_logits_of_single_sequences(model: GenericDecoder) -> None:
    """Prompts shorter than the kernel, one with several rows, and a row that leaves."""
    prompts, tails = random_sequences(1, 70), random_sequences(6, 6, 6)
    lengths, rows = torch.tensor([1, 70]), torch.tensor([1, 0, 1])
    with torch.no_grad():
        prefill = PrefillAttention(lengths)
        positions = torch.cat([torch.arange(1), torch.arange(70)])
        model(torch.cat(prompts)[None], positions=positions[None], attend=prefill)
        cache, alive = CachedAttention(prefill, lengths[rows], rows), [0, 1, 2]
        for step in range(6):
            token = torch.stack([tails[row][step] for row in alive])
            hidden = model(token[:, None], positions=cache.positions_B[:, None], attend=cache)
            cache.advance()
            for logits, row in zip(model.logits(hidden[:, 0]), alive, strict=True):
                whole = torch.cat([prompts[int(rows[row])], tails[row][: step + 1]])
                same(logits, packed_logits(model, [whole])[-1])
            if step == 2:
                cache.keep(torch.tensor([0, 2]))
                alive = [0, 2]


def test_a_batch_generates_what_transformers_generates_one_by_one(folder: Path, theirs: Any) -> None:
    """Greedily, from prompts of unequal lengths, of which some rows end early."""
    engine = engine_of(Learner(config(folder)))
    prompts = random_sequences(*LENGTHS)
    for limit in (1, 24):
        requests = [
            SampleRequest(tuple(p.tolist()), 1, 7, Sampling(max(1, limit - 3 * i), temperature=0.0))
            for i, p in enumerate(prompts)
        ]
        for request, (ours,) in zip(requests, engine.generate(requests), strict=True):
            whole = theirs.generate(
                torch.tensor([request.token_ids]),
                max_new_tokens=request.sampling.max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert ours.token_ids.tolist() == whole[0, len(request.token_ids) :].tolist()


def test_decays_stay_in_float32(folder: Path) -> None:
    model = load_decoder(folder, dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("A_log")} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith("A_log")} == {torch.bfloat16}


def test_a_folder_with_tower_and_multi_token_prediction_is_a_text_model_too(tmp_path: Path) -> None:
    folder = write_vision_family(tmp_path, "qwen3_5_vl")
    theirs: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "mtp.norm.weight": torch.ones(128)}, file, metadata={"format": "pt"})
    ours = load_decoder(folder, dtype=torch.float32, device=CPU)
    documents = random_sequences(*LENGTHS)
    with torch.no_grad():
        expected = torch.cat([theirs(document[None]).logits[0] for document in documents])
        same(packed_logits(ours, documents), expected)


def served(folder: Path, engine: str) -> RunConfig:
    cfg = config(folder, model={"lora_targets": ALL_LINEAR}, rollout=RolloutConfig(engine="vllm"))
    return with_served_model(replace(cfg, rewards=REWARDS), engine)


OTHERS: dict[str, dict[str, Any]] = {
    "Qwen3Next": {**LINEAR_ATTENTION, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "OlmoHybrid": LINEAR_ATTENTION,
    "Bamba": {"attn_layer_indices": [1]},
    "GraniteMoeHybrid": {"layer_types": LINEAR_ATTENTION["layer_types"]},
}
"""Families that no table has: gated delta nets of other layouts, and Mamba 2."""


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_models_with_a_state_are_admitted_by_the_same_proof(tmp_path: Path, family: str) -> None:
    own = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, **OTHERS[family]}
    made = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**{**SIZES, **own}))
    randomize(made, 0)
    made.save_pretrained(tmp_path)
    assert packed_gap(tmp_path, "qwen3_5") < 1e-4
    gap = torch_gap(tmp_path, "qwen3_5", "DoRA")
    assert isinstance(gap, float) and gap < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels for it")
def test_vllm_is_refused_on_a_cpu_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())  # a folder without weights
    words = r"vLLM's linear attention, as a 'qwen3_5_text' model has it, computes in bf16 .*needs rollout.engine=torch"
    with pytest.raises(ConfigError, match=words):
        served(tmp_path, "vllm")
    assert served(tmp_path, "auto").rollout.engine == "torch"


def test_vllm_on_a_gpu_is_refused_where_it_has_no_place_for_an_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"no place for adapters on in_proj_qkv and in_proj_z \(model.lora_targets\)"):
        served(folder, "vllm")
    assert vllm_gap(config(folder, model={"lora_targets": ["q_proj", "in_proj_a", "up_proj"]})) is None
    assert vllm_gap(config(folder, "full")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels for it")
def test_a_comparison_with_vllm_is_refused_in_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm")
    assert main(["doctor", "--parity", str(folder)]) == 2
    assert "vLLM's linear attention, as a 'qwen3_5_text' model has it" in capsys.readouterr().err


def test_layers_that_keep_their_state_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "mistral")
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "layer_types": ["linear_attention", "full_attention"]}))
    with pytest.raises(ConfigError, match="its layers of type 'linear_attention' have no part that takes"):
        load_decoder(folder, dtype=torch.float32, device=CPU)


def test_the_plan_counts_keys_of_attention_and_states_of_the_others(folder: Path, model: GenericDecoder) -> None:
    shapes = model_shapes(config(folder))
    assert isinstance(shapes, TransformersShapes)
    with torch.no_grad():
        prefill = PrefillAttention(torch.tensor([50]))
        model(random_sequences(50)[0][None], positions=torch.arange(50)[None], attend=prefill)
        cache = CachedAttention(prefill, torch.tensor([50]), torch.tensor([0]))
    states = sum(x.numel() * x.itemsize for x in cache.states())
    keys = sum(x.numel() * x.itemsize for x in (*prefill.keys, *prefill.values))
    assert states > 0 and shapes.kv_per_sequence(50, 4) == states + keys
