"""Exact DoRA in vLLM 0.32: LoRA layers with a gain for each output row and adapter slot.

    y = gain ⊙ (W x + B A x) + bias

vLLM fuses the bias into the product with W, so the layer computes `gain ⊙ (W x + bias + B A x) + (1 - gain) ⊙ bias`.
`W x + bias` comes from vLLM's kernels, in the model's dtype. B A x is added and the gain applied in float32, and only
the result is rounded again: a bf16 sum would lose gains of less than 0.4 % from 1.
The buffers' last row always has gain 1 and offset 0. vLLM's index -1, a token without adapter, selects it, so such
tokens get exactly the base's output.

Buffers are written in place and read by index, so CUDA graphs and compiled code see new values without recapture.
Shape letters: S slots, T tokens of a batch, O outputs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import vllm.lora.utils as lora_utils
from vllm.config import get_current_vllm_config
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import RowParallelLinear

from actors.vllm_engine.config import HAS_GAINS


def install() -> None:
    """Give every linear layer that vLLM wraps for LoRA a gain. Call before the model is built."""
    # vLLM 0.32 rejects DoRA and has no hook for layer classes. Its factory looks them up in this tuple.
    lora_utils._all_lora_classes = tuple(
        type(cls.__name__, (GainLayer, cls), {})
        if issubclass(cls, BaseLinearLayerWithLoRA) and not issubclass(cls, GainLayer)
        else cls
        for cls in lora_utils._all_lora_classes
    )


class GainLayer(BaseLinearLayerWithLoRA):
    """Mixin placed before each of vLLM's LoRA linear layers."""

    has_gains: bool
    """Whether slots may have gains. Fixed when the model is built, so that plain LoRA costs what it costs in vLLM."""
    gain_SO: torch.Tensor
    """[S+1, O] float32, 1 where a slot has no gain. bfloat16 would round each row by up to 0.4 %."""
    offset_SO: torch.Tensor | None
    """[S+1, O] float32, (1 - gain) ⊙ bias; None for a layer without bias."""

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        super().create_lora_weights(max_loras, lora_config, model_config)
        # part of the key of vLLM's cache of compiled code
        additional: Any = get_current_vllm_config().additional_config
        self.has_gains = additional.get(HAS_GAINS, True)
        self._slots_with_gain: set[int] = set()
        if not self.has_gains:
            return
        shape, device = (max_loras + 1, sum(self.part_sizes)), self.lora_a_stacked[0].device
        self.register_buffer("gain_SO", torch.ones(shape, device=device), persistent=False)
        offset_SO = None if self.gained_bias_O is None else torch.zeros(shape, device=device)
        self.register_buffer("offset_SO", offset_SO, persistent=False)

    @property
    def part_sizes(self) -> list[int]:
        """This rank's outputs of each Hugging Face module packed into this layer, such as q, k and v."""
        return [b.shape[2] for b in self.lora_b_stacked]

    @property
    def gained_bias_O(self) -> torch.Tensor | None:
        """The bias that this rank adds within the gain. A bias that the layer passes on to its caller is outside it
        already, and of a row-parallel layer's ranks only the first adds it."""
        if self.base_layer.skip_bias_add or (isinstance(self.base_layer, RowParallelLinear) and self.tp_rank > 0):
            return None
        return cast("torch.Tensor | None", self.base_layer.bias)

    def set_mapping(self, punica_wrapper: Any) -> None:
        super().set_mapping(punica_wrapper)
        # vLLM leaves these indices uninitialised, and the padding rows of a CUDA graph read them.
        punica_wrapper._token_lora_indices.fill_(-1)

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)
        self.reset_gain(index)

    def reset_gain(self, index: int) -> None:
        if index in self._slots_with_gain:
            self.gain_SO[index] = 1
            if self.offset_SO is not None:
                self.offset_SO[index] = 0
            self._slots_with_gain.discard(index)

    def gain_copies(
        self, index: int, gain_O: torch.Tensor | None, offset_O: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The copies, target and source, that give a slot this gain and this `gain_offset`; both [O] float32, of all
        packed parts, cut to this rank. None resets the slot.

        Ranks of a row-parallel layer each scale their partial sum, which is exact because the gain is linear; only the
        first rank adds the bias.
        """
        if gain_O is None:
            self.reset_gain(index)
            return []
        self._slots_with_gain.add(index)
        copies = [(self.gain_SO[index], gain_O)]
        if self.offset_SO is not None and offset_O is not None:
            copies.append((self.offset_SO[index], offset_O))
        return copies

    def gain_part(self, index: int, part: int) -> torch.Tensor:
        """A view, [O], of one packed part's gain."""
        return self.rows_of(self.gain_SO[index], part)

    def rows_of(self, row_O: torch.Tensor, part: int) -> torch.Tensor:
        """One packed part's outputs of a row of all parts."""
        start = sum(self.part_sizes[:part])
        return row_O[start : start + self.part_sizes[part]]

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output`: W x + bias."""
        if not self.has_gains and output.device.type != "cpu":
            return super()._apply_lora_to_output(x, output)  # vLLM's kernel rounds the sum once by itself
        # in place, into an output of another dtype than x: see `cpu_lora` and `gpu_lora`
        return self.scale(super()._apply_lora_to_output(x, output.float())).to(output.dtype)

    def _apply_async_impl(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """vLLM's path with VLLM_LORA_ENABLE_DUAL_STREAM, which rounds W x + bias + B A x itself."""
        output = super()._apply_async_impl(x, bias)
        if not self.has_gains:
            return output
        return self.scale(output.float()).to(output.dtype)

    def scale(self, output: torch.Tensor) -> torch.Tensor:
        # Compiled code and CUDA graphs must not depend on what the slots hold. Eager CPU code may, and skips unused
        # gains.
        if output.device.type == "cpu" and not self._slots_with_gain:
            return output
        # The wrapper's public property slices these indices by a Python int, which a graph would freeze.
        return apply_gain(output, self.gain_SO, self.offset_SO, self.punica_wrapper._token_lora_indices)


def gain_offset(gain_O: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    """`(1 - gain) ⊙ bias`, float32."""
    return (1 - gain_O) * bias_O.float()


def apply_gain(
    output: torch.Tensor, gain_SO: torch.Tensor, offset_SO: torch.Tensor | None, slot_T: torch.Tensor
) -> torch.Tensor:
    """`gain ⊙ output + offset` for each token's slot. `output`: [..., O] float32 with T rows."""
    flat_TO = output.view(-1, output.shape[-1])
    slot_T = slot_T[: flat_TO.shape[0]]
    scaled_TO = flat_TO * gain_SO[slot_T]
    if offset_SO is not None:
        scaled_TO = scaled_TO + offset_SO[slot_T]
    return scaled_TO.view_as(output)
