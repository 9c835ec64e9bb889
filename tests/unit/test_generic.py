"""Models of transformers with our attention: against transformers and PEFT, and against our own decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import check_against_peft, model_config, shake
from decoders import CPU, packed_logits, random_sequences
from families import FAMILIES, make_family
from learners import config, make_batch, make_groups
from safetensors.torch import load_file, save_file
from tiny import Family, make_text_model
from torch_engines import engine_of
from transformers import AutoModelForCausalLM

from learner.learner import Learner
from learner.logprobs import token_logprobs
from tora.adapters.inject import adapter_layers, from_wire, full_weight_parameters, inject, snapshot
from tora.adapters.merge import merge
from tora.adapters.snapshot import split_by_module, unpack
from tora.adapters.targets import adapter_shapes
from tora.config.schema import ALL_LINEAR
from tora.errors import ConfigError
from tora.models.attention import AttentionContext
from tora.models.base import Decoder
from tora.models.generic import GenericDecoder
from tora.models.generic_support import head_map
from tora.models.head import LogitMap
from tora.models.load import load_decoder
from tora.models.proof import prove
from tora.models.shared_prefix import SharedPrefixAttention
from tora.types import SampleRequest, Sampling

PROMPTS, COMPLETIONS, PROMPT_OF = (30, 5), (9, 40, 3), (0, 0, 1)
"""Lengths of prompts and completions, and each completion's prompt. Windows of 16 tokens end within and across."""


def shared() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, AttentionContext]:
    """Documents of prompt and completion; the same tokens with shared prompts, their positions and attention."""
    ids = random_sequences(*PROMPTS, *COMPLETIONS)
    prompts, completions = ids[:2], ids[2:]
    whole = [torch.cat([prompts[p], c]) for p, c in zip(PROMPT_OF, completions, strict=True)]
    starts = [0, 0, *(PROMPTS[p] for p in PROMPT_OF)]
    positions = torch.cat([start + torch.arange(len(x)) for start, x in zip(starts, ids, strict=True)])
    attend = SharedPrefixAttention(torch.tensor(PROMPTS), torch.tensor(COMPLETIONS), torch.tensor(PROMPT_OF))
    return whole, ids, positions, attend


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = make_family(tmp_path, family)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = load_decoder(folder, dtype=torch.float32, device=CPU)
    assert isinstance(ours, GenericDecoder)
    whole, ids, positions, attend = shared()
    with torch.no_grad():
        expected = [reference(document[None]).logits[0] for document in whole]
        torch.testing.assert_close(packed_logits(ours, whole), torch.cat(expected), atol=1e-4, rtol=1e-5)
        hidden = ours(torch.cat(ids)[None], positions=positions[None], attend=attend)[0]
        ends = [PROMPTS[p] for p in PROMPT_OF]
        tails = torch.cat([logits[end:] for logits, end in zip(expected, ends, strict=True)])
        torch.testing.assert_close(ours.logits(hidden[sum(PROMPTS) :]), tails, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_equal_those_of_peft(tmp_path: Path, family: str) -> None:
    """Outputs and gradients; PEFT loads what we export."""
    folder = make_family(tmp_path / "base", family)
    cfg = model_config(folder, "dora_cache", lora_targets=ALL_LINEAR)
    layers = {"phi3": 8, "phi4-mini": 8, "glm4": 12, "qwen3_moe": 8, "qwen3_5": 15}.get(family, 14)
    check_against_peft(cfg, folder, tmp_path / "adapter", layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_torch_engine_samples_from_the_learners_policy(tmp_path: Path, family: str) -> None:
    """Prefill and a cache that outgrows the windows, against the packed forward."""
    learner = Learner(config(make_family(tmp_path, family), "lora", model={"lora_targets": ALL_LINEAR}))
    shake(learner.model)
    prompts = [tuple(ids.tolist()) for ids in random_sequences(20, 3)]
    groups = engine_of(learner).generate([SampleRequest(p, 2, 7, Sampling(24, temperature=0.8)) for p in prompts])
    with torch.no_grad():
        for prompt, completions in zip(prompts, groups, strict=True):
            for completion in completions:
                whole = torch.tensor([*prompt, *completion.token_ids])
                logits = packed_logits(learner.model, [whole])[len(prompt) - 1 : -1] / 0.8
                expected = logits.log_softmax(1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=1e-4)


def gradients(model: Decoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs of the completions' tokens, and gradients of all trained parameters by Hugging Face's name."""
    _, ids, positions, attend = shared()
    tokens = torch.cat(ids)
    targets = tokens.roll(-1)
    logprobs = model(
        tokens[None],
        positions=positions[None],
        attend=attend,
        output_fn=lambda h: token_logprobs(h[0], model.head, targets, temperature=0.9, logit_map=model.logit_map)[0],
    )
    (logprobs * torch.linspace(-1, 1, len(tokens))).sum().backward()
    adapters = {
        f"{module}.{name}": getattr(layer, name)
        for module, layer in adapter_layers(model).items()
        for name in layer.adapter_params()
    }
    return logprobs.detach(), {n: p.grad for n, p in {**adapters, **full_weight_parameters(model)}.items()}


@pytest.mark.parametrize("lora_type", ["full", "lora", "dora", "dora_cache"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_both_implementations_of_a_model_agree(tmp_path: Path, family: Family, lora_type: str) -> None:
    """To 1e-4: log-probs, and gradients relative to the largest of a tensor."""
    folder = make_text_model(tmp_path, family, tied=family != "llama")
    found: list[Any] = []
    sent: dict[str, torch.Tensor] = {}
    for implementation in ("native", "transformers"):
        model = load_decoder(folder, dtype=torch.float32, device=CPU, implementation=implementation)
        assert isinstance(model, GenericDecoder) == (implementation == "transformers")
        if lora_type == "full":
            model.requires_grad_(True)
        else:
            inject(model, lora_type, adapter_shapes(model, model_config(folder, lora_type)))
            if found:
                from_wire(model, sent)
            else:
                shake(model)
                sent = unpack(snapshot(model, 0))
        found.append(gradients(model))
    (native, native_gradients), (generic, generic_gradients) = found
    torch.testing.assert_close(generic, native, atol=1e-4, rtol=0)
    assert generic_gradients.keys() == native_gradients.keys()
    for name, expected in native_gradients.items():
        error = (generic_gradients[name] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("quantize_base", [False, True])
def test_training_is_the_same_through_either(tmp_path: Path, quantize_base: bool) -> None:
    """Metrics of two steps with adapters off as the reference, and the adapters afterwards."""
    folder = make_text_model(tmp_path, "qwen2")
    loss = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.05}
    sgd = {"_component_": "torch.optim.SGD", "lr": 0.1}
    seen: list[Any] = []
    sent: dict[str, torch.Tensor] = {}
    for implementation in ("native", "transformers"):
        changes = {"loss": loss, "optimizer": sgd, "activation_checkpointing": "selective"}
        cfg = config(
            folder, "dora_cache", quantize_base=quantize_base, model={"implementation": implementation}, **changes
        )
        learner = Learner(cfg)
        if seen:
            from_wire(learner.model, sent)
        sent = unpack(learner.snapshot())
        metrics = [learner.step(make_batch(make_groups(3, seed=i), capacity=60)).metrics for i in range(2)]
        layers = adapter_layers(learner.model)
        seen.append((metrics, {n: getattr(m, p).detach() for n, m in layers.items() for p in m.adapter_params()}))
    for ours, theirs in zip(seen[0][0], seen[1][0], strict=True):
        for key in ("loss/total", "kl/mean", "learner/grad_norm", "policy/entropy"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-6), key
    for name, expected in seen[0][1].items():
        torch.testing.assert_close(seen[1][1][name], expected, atol=1e-5, rtol=1e-3)


def test_documents_do_not_see_each_other(tmp_path: Path) -> None:
    model = load_decoder(make_family(tmp_path, "mistral"), dtype=torch.float32, device=CPU)
    a, b, c = random_sequences(20, 20, 20)
    with torch.no_grad():
        first = packed_logits(model, [a, b])[20:]
        torch.testing.assert_close(packed_logits(model, [c, b])[20:], first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"lora_type": "full"}, {"quantize_base": True}])
def test_what_would_leave_out_the_experts_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    cfg = config(make_family(tmp_path, "qwen3_moe"), **changes)
    with pytest.raises(ConfigError, match=r"does not reach the experts of Qwen3MoeForCausalLM"):
        Learner(cfg)


@pytest.mark.parametrize(
    ("family", "damage", "words"),
    [
        ("mistral", {"layer_types": ["linear_attention", "full_attention"]}, "layers of type 'linear_attention'"),
        ("mistral", {"auto_map": {"AutoConfig": "configuration.Own"}}, "needs code from its own folder"),
        ("mistral", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
        ("mistral", {"model_type": "gpt2"}, "its decoder has no `layers`"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_reason(
    tmp_path: Path, family: str, damage: dict[str, Any], words: str
) -> None:
    folder = make_family(tmp_path, family)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(ConfigError, match=words):
        load_decoder(folder, dtype=torch.float32, device=CPU)


def test_logits_that_are_more_than_scaled_are_refused(tmp_path: Path) -> None:
    """The model's own forward is the judge, not the names in its config."""
    folder = make_family(tmp_path, "cohere2")
    hf: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert head_map(hf) == LogitMap(0.25)
    hf.logit_scale = 0.5  # what the forward uses
    with pytest.raises(ConfigError, match="does more to its logits"):
        head_map(hf)
    hf.logit_scale = 0.25
    assert torch.isfinite(hf(torch.tensor([[5, 6]])).logits).all(), "the model is whole again"


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = make_family(tmp_path, "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for damaged, words in (
        ({k: v for k, v in tensors.items() if k != name}, r"has shape|lacks|cannot be read"),
        ({**tensors, "model.layers.1.mlp.extra.weight": torch.zeros(1)}, "does not belong"),
        ({**tensors, "model.norm.weight": torch.zeros(3)}, "has shape"),
        ({k: v for k, v in tensors.items() if k != "model.norm.weight"}, "lacks 1 tensors .*model.norm.weight"),
    ):
        save_file(damaged, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=words):
            load_decoder(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_merged_model_is_the_policy(tmp_path: Path, quantized: bool) -> None:
    """Fused modules, a tied head, and a base that went through NF4."""
    folder = make_family(tmp_path / "base", "phi4-mini")
    within = {"max_prompt_tokens": 400, "max_generated_tokens": 100}  # of the short frequencies, as below
    cfg = config(folder, "dora_cache", quantize_base=quantized, model={"lora_targets": ALL_LINEAR}, **within)
    learner = Learner(cfg)
    shake(learner.model)
    adapters = split_by_module(unpack(learner.snapshot()))
    report = merge(
        folder,
        tmp_path / "merged",
        adapters=adapters,
        weights={},
        quantized_in=torch.float32 if quantized else None,
    )
    assert report.num_modules == len(adapters) == 8
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    (ids,) = random_sequences(30)
    with torch.no_grad():
        torch.testing.assert_close(packed_logits(learner.model, [ids]), merged(ids[None]).logits[0], atol=1e-4, rtol=0)


def test_a_model_that_our_attention_would_change_is_refused_with_the_layer(tmp_path: Path) -> None:
    """Here its code scales the second layer's scores by itself in one of the two kinds of attention."""
    model = load_decoder(make_family(tmp_path, "gemma2"), dtype=torch.float32, device=CPU)
    assert isinstance(model, GenericDecoder)
    prove(model, CPU)
    attention = model.hf.model.layers[1].self_attn
    plain = attention.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        attention.scaling = 0.125 if "tora_attend" in kwargs else 0.5
        return plain(*args, **kwargs)

    attention.forward = odd
    with pytest.raises(ConfigError, match=r"part from its own after model.layers.1, by .* is allowed"):
        prove(model, CPU)
    attention.forward = plain
    attention.q_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"by nan of their size"):
        prove(model, CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_to_bf16_is_no_difference(tmp_path: Path, family: str) -> None:
    folder = make_family(tmp_path, family)
    for quantize_base in (False, True):
        if quantize_base and "moe" in family:
            continue
        model = load_decoder(folder, dtype=torch.bfloat16, device=CPU, quantize_base=quantize_base)
        assert isinstance(model, GenericDecoder)
        prove(model, CPU)
