"""Which frozen parameters a learner takes from an engine."""

from __future__ import annotations

from pathlib import Path

import torch
from learners import config
from tiny import make_text_model

from learner.learner import Learner
from learner.shared_base import SharedBase


def test_only_what_is_equal_to_the_bit_is_taken(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path)
    own = {learner_name(name): p.detach() for name, p in Learner(config(folder)).model.named_parameters()}
    engine = {name: tensor.clone() for name, tensor in own.items() if ".q_proj." not in name}
    engine["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-6
    engine["model.layers.0.mlp.gate_proj.weight"] = engine["model.layers.0.mlp.gate_proj.weight"].bfloat16()
    engine["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    asked: list[str] = []

    def weights(names: list[str]) -> dict[str, torch.Tensor]:
        asked.extend(names)
        return {name: engine[name] for name in names if name in engine}

    shared = SharedBase(weights)
    model = Learner(config(folder), shared_base=shared).model
    taken = {
        name
        for ours, parameter in model.named_parameters()
        if (name := learner_name(ours)) in engine and parameter.data_ptr() == engine[name].data_ptr()
    }
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "embed_tokens")
    matrices = {name for name in own if name.removesuffix(".weight").endswith(leaves)}
    refused = {name for name in matrices if ".q_proj." in name} | {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    assert taken == matrices - refused and len(taken) > 8
    assert shared.nbytes == sum(engine[name].nbytes for name in taken)
    assert not any(parameter.requires_grad for n, parameter in model.named_parameters() if learner_name(n) in taken)
    assert matrices <= set(asked)


def learner_name(name: str) -> str:
    """Hugging Face's name of one of our parameters; an adapter keeps its own."""
    from tora.models.names import Names

    return name if "lora" in name else Names().parameter_to_hf(name)
