"""Any causal language model of the installed transformers, with our attention in its layers.

transformers' layers look their attention up by name and pass unknown keyword arguments on to it. Ours is registered
under `NAME` and runs the `AttentionContext` of a forward, so training, prefill and decoding pack, share prompts and
cache keys as they do in our own decoder. Everything else is the model's own code.

Shapes: b batch, s sequence, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from tora.models.attention import AttentionContext, LayerAttention, Scores
from tora.models.base import Decoder, identity
from tora.models.generic_support import head_map, is_router, recurrent_part
from tora.models.quantize import FrozenLinear
from tora.models.recurrence import Recurrence

NAME = "tora"
"""Of our attention, in transformers' registry."""
_ATTEND = "tora_attend"
"""The keyword argument that carries it: an `AttentionContext` to the model, a `LayerAttention` to a layer."""
_RECUR = "tora_recur"
"""In its place for a layer that carries a state: a `Recurrence`."""
_PREFIX = "hf."


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    tora_attend: LayerAttention | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [b, H, s, D], key and value [b, K, s, D] -> [b, s, H, D]. Dropout is
    left out: training and sampling must have the same policy."""
    assert tora_attend is not None and s_aux is None, "refused by the checks of `build`"
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return tora_attend(q, k, v, Scores(scaling, sliding_window, softcap)), None


def _to_hf(name: str) -> str:
    return name.removeprefix(_PREFIX)


class GenericNames:
    """Hugging Face's names are the model's own, after a prefix."""

    def module_to_hf(self, name: str) -> str:
        return _to_hf(name)

    def parameter_to_hf(self, name: str) -> str:
        return _to_hf(name)

    def parameter_from_hf(self, name: str) -> str:
        return _PREFIX + name


class GenericDecoder(Decoder):
    """A model of transformers behind the interface of ours."""

    names: GenericNames = GenericNames()

    def __init__(self, hf: Any) -> None:
        """`hf`: a causal language model, built with `attn_implementation=NAME`."""
        super().__init__()
        self.hf = hf
        self.logit_map = head_map(hf)
        self._layers: list[nn.Module] = list(hf.get_decoder().layers)
        inside = {f"{name}.": layer for name, layer in self.named_modules() if layer in set(self._layers)}
        self._linears = [
            name
            for name, module in self.named_modules()
            if type(module) in (nn.Linear, FrozenLinear) and name.startswith(tuple(inside)) and not is_router(name)
        ]
        self.is_tied = bool(hf.config.tie_word_embeddings)
        if self.is_tied:  # one module less, whose weight would have to be tied again after loading
            hf.set_output_embeddings(None)
        self.recurrent: set[int] = set()
        """The layers that carry a state in place of attention."""
        for index, layer in enumerate(self._layers):
            if part := recurrent_part(hf, index, layer):
                self.recurrent.add(index)
                part.layer_idx = 0  # in a cache of its own, and for compiled layers the same in all of them
                part.forward = partial(_with_recurrence, part.forward)
            layer.register_forward_pre_hook(_at(index, recurrent=index in self.recurrent), with_kwargs=True)
        for module in hf.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # training mode is for adapters' dropout; see `learner.dropout`

    @property
    def head(self) -> torch.Tensor:
        module = self.hf.get_input_embeddings() if self.is_tied else self.hf.get_output_embeddings()
        return module.weight

    @property
    def embedding(self) -> torch.Tensor:
        return self.hf.get_input_embeddings().weight

    def stacks(self) -> list[list[nn.Module]]:
        return [self._layers]

    def adaptable(self) -> list[str]:
        return self._linears

    def quantizable(self) -> set[str]:
        return {f"{name}.weight" for name in self._linears}

    def gap(self, *, full: bool, quantize: bool) -> str | None:
        convolutions = {f"{n}.weight" for n, module in self.named_modules() if isinstance(module, nn.Conv1d)}
        experts = [n for n, p in self.named_parameters() if p.ndim == 3 and n not in convolutions]
        if not experts or not (full or quantize):
            return None
        key = "model.lora_type=full" if full else "model.quantize_base=true"
        return f"{key} does not reach the experts of {type(self.hf).__name__}, such as {_to_hf(experts[0])}"

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor,
        attend: AttentionContext | None,
        output_fn: Callable[[torch.Tensor], Any] = identity,
        images: Any = None,
    ) -> Any:
        """Like `Decoder.forward`; without `attend` only inside `own_attention`."""
        assert images is None
        return output_fn(self._decode(positions, attend, input_ids=tokens))

    def _decode(self, positions: torch.Tensor, attend: AttentionContext | None, **inputs: Any) -> torch.Tensor:
        """Hidden states after the final norm, [b, s, hidden], of `input_ids` or `inputs_embeds`."""
        ours = {} if attend is None else {_ATTEND: attend}
        return self.hf.get_decoder()(position_ids=positions, use_cache=False, **inputs, **ours).last_hidden_state

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Within the context the model has transformers' plain attention, for one document at a time."""
        self.hf.set_attn_implementation(self.attention_settings("eager"))
        try:
            yield
        finally:
            self.hf.set_attn_implementation(self.attention_settings(NAME))

    @classmethod
    def attention_settings(cls, name: str) -> Any:
        """transformers' `attn_implementation` for a language model's attention of this name."""
        return name


def _at(index: int, *, recurrent: bool) -> Callable[..., Any]:
    """A hook that gives a layer its own attention. Outside the layer's forward, so that compiled layers share one
    graph."""

    def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if _ATTEND not in kwargs:
            return args, kwargs
        others = {name: value for name, value in kwargs.items() if name != _ATTEND}
        context: AttentionContext = kwargs[_ATTEND]
        own = {_RECUR: context.recurrent_at(index)} if recurrent else {_ATTEND: context.at(index)}
        return args, {**others, **own}

    return hook


def _with_recurrence(
    forward: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    *,
    tora_recur: Recurrence | None = None,
    cache_params: Any = None,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """`forward` of a part of transformers' that carries a state, as `tora_recur` has it; without one, its own."""
    if tora_recur is None:
        return forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **others)

    def run(x_RLH: torch.Tensor, *, mask_RL: torch.Tensor | None, cache: Any) -> torch.Tensor:
        return forward(x_RLH, cache_params=cache, attention_mask=mask_RL, **others)

    return tora_recur(run, hidden_states)
