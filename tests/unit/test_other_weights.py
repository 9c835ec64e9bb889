"""Folders whose weights or tokens are not the plain case: both implementations load what transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import CPU, packed_logits, random_sequences
from families import make_family
from learners import config
from safetensors import safe_open
from tiny import make_text_model
from torch_engines import engine_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.learner import Learner
from tora.config.load import load_config
from tora.config.schema import Implementation
from tora.errors import ConfigError
from tora.models.load import load_decoder
from tora.tasks.encode import encode_prompt
from tora.tasks.prompts import RunPrompts
from tora.tasks.tokenizer import load_tokenizer, stop_token_ids
from tora.types import SampleRequest, Sampling

BOTH: list[Implementation] = ["native", "transformers"]


def same_logits(folder: Path, implementation: Implementation, highest: int = 259) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = load_decoder(folder, dtype=torch.float32, device=CPU, implementation=implementation)
    (ids,) = random_sequences(20)
    ids[-1] = highest
    with torch.no_grad():
        torch.testing.assert_close(packed_logits(ours, [ids]), reference(ids[None]).logits[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_precision_are_loaded_in_the_runs(
    tmp_path: Path, implementation: Implementation, dtype: torch.dtype
) -> None:
    folder = make_text_model(tmp_path, "qwen2", dtype=dtype)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == dtype
    same_logits(folder, implementation)


@pytest.mark.parametrize("family", ["llama", "phi4-mini", "qwen3_moe"])
def test_weights_in_several_files(tmp_path: Path, family: str) -> None:
    """A layer's tensors, and the experts of one, in different files."""
    folder = make_text_model(tmp_path, "llama") if family == "llama" else make_family(tmp_path, family)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    assert len(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())) > 3
    for implementation in BOTH if family == "llama" else ["transformers"]:
        same_logits(folder, implementation)


@pytest.mark.parametrize("implementation", BOTH)
def test_added_tokens_with_resized_embeddings(tmp_path: Path, implementation: Implementation) -> None:
    """Their rows are sampled from, and trained on, like any other."""
    folder = make_text_model(tmp_path, "qwen2")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<tool_{i}>" for i in range(80)])
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[320:].normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) > 320
    same_logits(folder, implementation, highest=len(tokenizer) - 1)
    ids = encode_prompt(load_tokenizer(folder, None), "call <tool_79>")
    assert len(tokenizer) - 1 in ids
    engine = engine_of(Learner(config(folder, model={"implementation": implementation})))
    (group,) = engine.generate([SampleRequest(ids, 32, 7, Sampling(24))])
    assert max(int(completion.token_ids.max()) for completion in group) >= 320


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("implementation", BOTH)
def test_generation_stops_at_each_of_several_end_tokens(
    tmp_path: Path, where: str, implementation: Implementation
) -> None:
    folder = make_text_model(tmp_path, "qwen2")
    file = folder / where
    fields = json.loads(file.read_text()) if file.is_file() else {}
    ends = list(range(60, 90))
    file.write_text(json.dumps({**fields, "eos_token_id": ends}))
    stop = stop_token_ids(folder, load_tokenizer(folder, None))
    assert set(ends) < set(stop)
    engine = engine_of(Learner(config(folder, model={"implementation": implementation})))
    (group,) = engine.generate([SampleRequest((5, 6, 7), 32, 7, Sampling(40, stop_token_ids=stop))])
    last = {int(completion.token_ids[-1]) for completion in group if completion.stopped}
    assert len(last) > 3 and last <= set(stop)
    assert all(set(stop).isdisjoint(completion.token_ids[:-1].tolist()) for completion in group)


def test_a_missing_chat_template_names_its_remedy(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "model", "qwen2")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "own.jinja").write_text(template)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "1 + 1 ="}], "answer": "2"}) + "\n")
    rows = ["dataset={_component_: tora.tasks.dataset.file_dataset, path: " + str(data) + "}", "eval=null"]
    overrides = [f"model.path={folder}", f"output_dir={tmp_path}/run", *rows]
    with pytest.raises(ConfigError, match=r"no chat template; name a file that has one in chat_template"):
        RunPrompts(load_config("quickstart", overrides)).at(0)
    prompt = RunPrompts(load_config("quickstart", [*overrides, f"chat_template={tmp_path / 'own.jinja'}"])).at(0)
    assert load_tokenizer(folder, None).decode(prompt.token_ids).startswith("<|im_start|>user\n1 + 1 =<|im_end|>")
