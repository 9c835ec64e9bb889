"""Config and files that disagree about a tied head: as transformers, or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import CPU, packed_logits, random_sequences
from safetensors.torch import load_file, save_file
from tiny import make_text_model, make_vl_model
from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration

from tora.errors import ConfigError
from tora.models.load import load_decoder

Make = Callable[..., Path]
MODELS: dict[str, tuple[Make, Any]] = {
    "text": (make_text_model, AutoModelForCausalLM),
    "vision": (make_vl_model, Qwen3VLForConditionalGeneration),
}


def set_flag(folder: Path, tied: bool) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": tied}))
    return folder


def embedding(folder: Path) -> torch.Tensor:
    return next(t for n, t in load_file(folder / "model.safetensors").items() if n.endswith("embed_tokens.weight"))


def store_head(folder: Path, head: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": head.contiguous()}, file, metadata={"format": "pt"})


@torch.no_grad()
def check(folder: Path, theirs: Any) -> None:
    """Raises AssertionError unless logits equal those of transformers."""
    model, (sequence,) = theirs.from_pretrained(folder, dtype=torch.float32), random_sequences(9)
    ours = load_decoder(folder, dtype=torch.float32, device=CPU)
    expected = model(input_ids=sequence[None]).logits[0]
    torch.testing.assert_close(packed_logits(ours, [sequence]), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_flag_beside_another_head_is_refused(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Transformers would use the file's head, vLLM the embedding."""
    make, theirs = MODELS[kind]
    folder = set_flag(make(tmp_path, tied=False), True)
    model = theirs.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    with pytest.raises(ConfigError, match=r"tie_word_embeddings=true, .* a lm_head.weight that differs"):
        load_decoder(folder, dtype=dtype, device=CPU)
    check(set_flag(folder, False), theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_that_is_missing_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """Transformers would initialise the head randomly."""
    make, theirs = MODELS[kind]
    folder = set_flag(make(tmp_path, tied=True), False)
    with pytest.raises(ConfigError, match=r"tie_word_embeddings=false, .* no lm_head.weight; set it to true"):
        load_decoder(folder, dtype=torch.float32, device=CPU)
    check(set_flag(folder, True), theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_a_stored_copy_of_the_embedding_is_a_tied_head(tmp_path: Path, kind: str) -> None:
    make, theirs = MODELS[kind]
    folder = make(tmp_path, tied=True)
    store_head(folder, embedding(folder).clone())
    check(folder, theirs)


@pytest.mark.parametrize("damage", ["last row", "nan", "shape"])
def test_the_whole_copy_is_compared(tmp_path: Path, damage: str) -> None:
    folder = make_text_model(tmp_path, vocab_size=5000)
    head = embedding(folder).clone()
    if damage == "shape":
        head = head[:-1]
    else:
        head[-1, -1] = float("nan") if damage == "nan" else head[-1, -1] + 1
    store_head(folder, head)
    with pytest.raises(ConfigError, match="differs from the embedding"):
        load_decoder(folder, dtype=torch.float32, device=CPU)
