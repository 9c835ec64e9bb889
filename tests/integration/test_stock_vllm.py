"""An exported adapter in stock vLLM, without our extension: the adapter is read from its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import shake
from learners import config
from peft import PeftModel
from peft_reference import TOLERANCE, VisionReference
from tiny import LINEARS, make_text_model, make_vl_model, picture
from transformers import AutoModelForCausalLM
from vision_learners import vl_config

from learner.learner import Learner
from tora.launch.policies import export_merged
from tora.run.target import find

pytest.importorskip("vllm")

from actors.vllm_engine.images import vision_linears

_STOCK = """
import io, json, sys
import tora  # lets vLLM's dependencies import with a CPU build of torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
asked = json.load(sys.stdin)
lora = dict(enable_lora=True, max_lora_rank=8, lora_target_modules=asked["targets"],
    enable_tower_connector_lora=asked["tower"], mm_device_do_normalize=False,
    limit_mm_per_prompt={"video": 0}) if "adapter" in asked else {}
llm = LLM(asked["model"], dtype="float32", max_model_len=256, max_num_seqs=4, enforce_eager=True,
    kv_cache_memory_bytes=16 << 20, **lora)
images = [Image.open(io.BytesIO(bytes.fromhex(image))) for image in asked.get("images", [])]
prompt = {"prompt_token_ids": asked["prompt"], **({"multi_modal_data": {"image": images}} if images else {})}
request = LoRARequest("policy", 1, asked["adapter"]) if lora else None
params = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
(output,) = llm.generate([prompt], params, lora_request=request, use_tqdm=False)
sample = output.outputs[0]
pairs = [(token, step[token].logprob) for token, step in zip(sample.token_ids, sample.logprobs)]
print("ANSWER" + json.dumps({"prompt": list(output.prompt_token_ids), "pairs": pairs}))
"""


def stock_vllm(**asked: Any) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _STOCK], input=json.dumps(asked), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("ANSWER")[2])


@pytest.mark.slow
def test_a_merged_dora_is_served_as_in_peft(tmp_path: Path) -> None:
    """vLLM refuses DoRA adapters; the merged folder is a model like any other."""
    folder = make_text_model(tmp_path / "model")
    learner = Learner(config(folder, "dora"))
    shake(learner.model)
    learner.export(tmp_path / "adapter")
    export_merged(find(str(tmp_path / "adapter")), tmp_path / "merged")
    prompt = list(range(20, 60))
    answer = stock_vllm(model=str(tmp_path / "merged"), prompt=prompt)
    tokens, logprobs = zip(*answer["pairs"], strict=True)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((expected - torch.tensor(logprobs)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("train_vision", [pytest.param("none", marks=pytest.mark.slow), "lora"])
def test_an_exported_lora_is_served_as_in_peft(tmp_path: Path, train_vision: str) -> None:
    folder, adapter = make_vl_model(tmp_path / "model"), tmp_path / "adapter"
    learner = Learner(vl_config(folder, "lora", train_vision))
    shake(learner.model)
    learner.export(adapter)
    reference = VisionReference(folder, tower=False)
    images = (picture(160, 96), picture(64, 64, seed=1))
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    ids = list(reference.processor.encode([{"role": "user", "content": content}], images))
    placeholder = reference.processor.image_token_id
    short = [token for before, token in pairwise([0, *ids]) if token != placeholder or before != placeholder]
    tower = train_vision == "lora"
    answer = stock_vllm(
        model=str(folder),
        adapter=str(adapter),
        tower=tower,
        targets=[*LINEARS, *(vision_linears(str(folder)) if tower else ())],
        prompt=short,
        images=[image.hex() for image in images],
    )
    assert answer["prompt"] == ids
    tokens, logprobs = zip(*answer["pairs"], strict=True)
    theirs = PeftModel.from_pretrained(reference.model("base"), str(adapter)).eval()

    def gap() -> float:
        with torch.no_grad():
            logits = reference.logits(theirs, [*ids, *tokens], images)[len(ids) - 1 : -1]
        expected = logits.log_softmax(1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return float((expected - torch.tensor(logprobs)).abs().max())

    assert gap() < TOLERANCE
    with theirs.disable_adapter():
        assert gap() > 0.05, "the adapter has a visible effect"
