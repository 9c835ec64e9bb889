"""Hugging Face's parameter names <-> ours. Our decoders use torchtune's names; vision towers keep Hugging Face's."""

from __future__ import annotations

import re
from dataclasses import dataclass

TOWER = "visual."
"""Prefix of the vision tower's modules in our models."""
TOWERS = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector")
"""Last names of the modules that make features of images, in Hugging Face's models."""
_MODULES = {
    "embed_tokens": "tok_embeddings",
    "norm": "norm",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
}
_TO_HF = {ours: theirs for theirs, ours in _MODULES.items()}
_LAYER = re.compile(r"(layers\.\d+\.)(.+)")


def _split(name: str) -> tuple[str, str]:
    """`layers.3.mlp.w3` -> `layers.3.` and `mlp.w3`; the first part is empty outside layers."""
    match = _LAYER.fullmatch(name)
    return (match[1], match[2]) if match else ("", name)


@dataclass(frozen=True, slots=True)
class Names:
    """The name mapping of one family, between full dotted names."""

    decoder: str = "model."
    """Hugging Face's prefix of the decoder's modules, except the head."""
    tower: str | None = None
    """Hugging Face's prefix of the vision tower's modules; None without a tower."""

    def module_from_hf(self, name: str) -> str | None:
        """`model.layers.3.mlp.up_proj` -> `layers.3.mlp.w3`; None for an unknown name."""
        if name == "lm_head":
            return "output"
        if self.tower and name.startswith(self.tower):
            return TOWER + name.removeprefix(self.tower)
        if not name.startswith(self.decoder):
            return None
        layer, leaf = _split(name.removeprefix(self.decoder))
        return layer + _MODULES[leaf] if leaf in _MODULES else None

    def module_to_hf(self, name: str) -> str:
        """`layers.3.mlp.w3` -> `model.layers.3.mlp.up_proj`."""
        if name == "output":
            return "lm_head"
        if self.tower and name.startswith(TOWER):
            return self.tower + name.removeprefix(TOWER)
        layer, leaf = _split(name)
        return self.decoder + layer + _TO_HF[leaf]

    def parameter_from_hf(self, name: str) -> str | None:
        """`model.norm.weight` -> `norm.scale`; None for an unknown name."""
        module, _, leaf = name.rpartition(".")
        ours = self.module_from_hf(module)
        if ours is None:
            return None
        scales = ours.endswith("norm") and leaf == "weight" and not ours.startswith(TOWER)
        return f"{ours}.{'scale' if scales else leaf}"

    def parameter_to_hf(self, name: str) -> str:
        """`norm.scale` -> `model.norm.weight`."""
        module, _, leaf = name.rpartition(".")
        return f"{self.module_to_hf(module)}.{'weight' if leaf == 'scale' else leaf}"
