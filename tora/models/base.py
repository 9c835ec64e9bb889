"""What learner, adapters and torch engine need of a model, whichever implementation it has.

Shapes: b batch, s sequence, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from tora.models.attention import AttentionContext
from tora.models.head import LogitMap, head_logits


class NameMap(Protocol):
    """Hugging Face's names <-> the model's own, both full and dotted."""

    def module_to_hf(self, name: str) -> str: ...

    def parameter_to_hf(self, name: str) -> str: ...

    def parameter_from_hf(self, name: str) -> str | None:
        """None for an unknown name."""
        ...


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


class Decoder(nn.Module):
    """A causal language model whose attention and head belong to its caller: tokens in, hidden states out."""

    names: NameMap
    lm_head_fp32 = False
    """Whether `logits` keeps the float32 sums of its product; see `head_logits`."""
    logit_map = LogitMap()
    """What the model does to its head's product."""
    image_token: int | None = None
    """Id of the token whose place an image's feature takes; None for a model that takes no images."""
    video_token: int | None = None
    has_grid_positions = False
    """Whether images take positions by row and column; see `tora.models.vision.mrope`."""
    towers: tuple[str, ...] = ()
    """Names of the modules that make features of images."""

    @property
    def head(self) -> torch.Tensor:
        """The head's weight, [vocabulary, hidden]; for a tied head, the embedding's. Use only inside `output_fn`: a
        sharded head is gathered only during the forward."""
        raise NotImplementedError

    @property
    def embedding(self) -> torch.Tensor:
        """The embedding's weight, [vocabulary, hidden], in the dtype that the layers compute in."""
        raise NotImplementedError

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """[N, V] float32. Use only inside `output_fn`, as `head`."""
        return self.logit_map(head_logits(hidden_NH, self.head, fp32=self.lm_head_fp32))

    def stacks(self) -> list[list[nn.Module]]:
        """Stacks of equal layers; each layer is checkpointed and sharded separately."""
        raise NotImplementedError

    def compilable(self) -> list[list[nn.Module]]:
        """The stacks whose layers torch.compile takes whole."""
        return self.stacks()

    def adaptable(self) -> list[str]:
        """Names of the linear layers in the decoder's layers that may carry an adapter."""
        raise NotImplementedError

    def quantizable(self) -> set[str]:
        """Names of the parameters that `quantize_base` quantises: no embedding, head, norm or bias."""
        raise NotImplementedError

    def image_inputs(self, pixels: Any, places: Any, device: torch.device) -> Any:
        """The argument `images` of the forward, for `tora.models.vision`'s `Pixels` and `Places`; of a model that takes
        images."""
        raise NotImplementedError

    def gap(self, *, full: bool, quantize: bool) -> str | None:
        """Why all weights cannot be trained, or the base cannot be quantised; None where both can."""
        return None

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor,
        attend: AttentionContext,
        output_fn: Callable[[torch.Tensor], Any] = identity,
        images: Any = None,
    ) -> Any:
        """tokens and positions, [b, s] int64 -> `output_fn` applied to the hidden states after the final norm,
        [b, s, hidden]. `images` is for models that take them."""
        raise NotImplementedError
