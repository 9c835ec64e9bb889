"""The sampler of vLLM's Model Runner V2, which runs on GPUs alone, under our wrapper, by Triton's interpreter on a CPU.

A program of its own, because Triton reads its settings at import. Prints a JSON object: for each way to sample, the
largest error of the log-prob under the distribution drawn from and under the policy, against formulas in float64, and
how far the frequencies of what was drawn are from that distribution.
"""

from __future__ import annotations

import triton_on_cpu  # noqa: F401

# isort: split
import json
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu.sample import sampler as module
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from actors.torch_engine.sampling import log_distribution, log_policy
from actors.vllm_engine import policy_logprobs
from actors.vllm_engine.requests import LoadedPolicy, sampling_params
from tora.types import SampleRequest, Sampling

VOCAB, PROMPT = 300, (5, 9, 9, 250)
ROWS, DRAWS = 32, 6
"""Requests of one kind in a batch, each with a seed of its own, and batches."""
CPU = torch.device("cpu")
CONFIG = VllmConfig()
SEEN = torch.zeros(1, VOCAB, dtype=torch.bool).index_fill(1, torch.tensor(PROMPT), True)
KINDS = {
    "plain": Sampling(8),
    "tempered": Sampling(8, temperature=0.6),
    "greedy": Sampling(8, temperature=0.0),
    "top_k": Sampling(8, top_k=5),
    "top_p": Sampling(8, temperature=1.4, top_p=0.8),
    "min_p": Sampling(8, min_p=0.1),
    "penalised": Sampling(8, temperature=0.8, repetition_penalty=1.3),
    "all": Sampling(8, temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    "greedy, penalised": Sampling(8, temperature=0.0, repetition_penalty=1.5),
}


def make_sampler(samplings: list[Sampling], seed: int) -> Any:
    """A sampler with one request for each entry, as the runner adds them."""
    states = RequestState(len(samplings), 64, 256, 1, VOCAB, CPU)
    sampler = Sampler(CONFIG, len(samplings), VOCAB, CPU, states, logprobs_mode="processed_logprobs")
    for number, sampling in enumerate(samplings):
        states.add_request(str(number), len(PROMPT), list(PROMPT), len(PROMPT), sampling.max_tokens)
        index = states.req_id_to_index[str(number)]
        sampler.add_request(index, sampling_params(SampleRequest(PROMPT, 1, 1000 * seed + number, sampling)))
    states.apply_staged_writes()
    sampler.apply_staged_writes()
    return sampler


def batch(sampler: Any, count: int) -> InputBatch:
    """Each request's first token, in the order of their names rather than of their places."""
    made = InputBatch.make_dummy(count, count * len(PROMPT), InputBuffers(count, count * len(PROMPT), CPU))
    places = np.array([sampler.req_states.req_id_to_index[str(number)] for number in range(count)])
    made.idx_mapping_np = places
    made.idx_mapping = made.expanded_idx_mapping = torch.from_numpy(places)
    made.positions += len(PROMPT) - 1
    return made


def errors(samplings: list[Sampling], seed: int) -> list[float]:
    """Of each request's log-probs, under the distribution that it draws from and under the policy."""
    logits = 3 * torch.randn(len(samplings), VOCAB, generator=torch.Generator().manual_seed(1))
    before, made = logits.clone(), make_sampler(samplings, seed)
    output = made(logits, batch(made, len(samplings)))
    assert torch.equal(logits, before), "what the model computed is left alone"
    columns, found = output.logprobs_tensors.logprobs, []
    for row, sampling in enumerate(samplings):
        own, token = logits[row : row + 1].double(), int(output.sampled_token_ids[row, 0])
        drawn = float(log_distribution(own, sampling, SEEN)[0, token])
        policy = float(log_policy(own, sampling.temperature)[0, token])
        last = columns.shape[1] - 1 if sampling.reshapes else 0
        found.append(max(abs(float(columns[row, 0]) - drawn), abs(float(columns[row, last]) - policy)))
    return found


def frequencies(sampling: Sampling) -> float:
    """Total variation between what one row draws under many seeds and its distribution, as a multiple of its mean for
    as many independent draws; 0 if there is none."""
    counts = torch.zeros(VOCAB)
    for seed in range(DRAWS):
        logits = 3 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
        made = make_sampler([sampling] * ROWS, seed)
        output = made(logits.repeat(ROWS, 1), batch(made, ROWS))
        counts += torch.bincount(output.sampled_token_ids[:, 0], minlength=VOCAB)
    logprobs = log_distribution(logits, sampling, SEEN)
    probability = logprobs[0].exp()
    if sampling.temperature == 0:
        probability = torch.zeros(VOCAB).index_fill(0, logprobs.argmax(1), 1.0)
    assert counts[probability == 0].sum() == 0, "nothing outside the support is drawn"
    variation = (counts / counts.sum() - probability).abs().sum() / 2
    # each count is nearly normal, and the mean of a normal's absolute value is sqrt(2 / pi) of its deviation
    mean = (probability * (1 - probability) / counts.sum() * 2 / torch.pi).sqrt().sum() / 2
    return float(variation / mean) if mean > 0 else float(variation)


def mapped() -> list[int]:
    """The adapter of each token, as the runner tells it to vLLM's LoRA wrapper: two slots and the base."""
    state = LoraState(4)
    policies = {slot: LoadedPolicy(slot, slot, _named(slot), "") for slot in (1, 2)}
    for name, index, slot in (("a", 3, 1), ("b", 0, None), ("c", 1, 2)):
        state.add_request(name, index, policies[slot].lora if slot else None)
    prompts, tokens, active = state.make_lora_inputs(["c", "b", "a"], np.array([1, 0, 3]), np.array([2, 1, 3]))
    assert prompts == (2, 0, 1) and {lora.lora_int_id for lora in active} == {1, 2}
    return [int(token) for token in tokens]


def _named(slot: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"policy@{slot}", slot, f"mem://{slot}")


def main() -> None:
    assert HAS_TRITON
    buffer_utils.is_uva_available = lambda: False  # no memory is pinned without a GPU
    module.apply_top_k_top_p = apply_top_k_top_p_pytorch  # the interpreter does not run the kernel of it
    policy_logprobs.wrap_v2(Sampler)
    policy_logprobs.wrap_v2(Sampler)  # twice is once
    found: dict[str, Any] = {}
    for names in (list(KINDS)[:5], list(KINDS)[3:], ["plain", "tempered", "greedy"]):
        for name, error in zip(names, errors([KINDS[name] for name in names], seed=7), strict=True):
            found[name] = {"error": max(error, found.get(name, {}).get("error", 0.0))}
    for name, sampling in KINDS.items():
        found[name]["error"] = max(found[name]["error"], *errors([sampling], seed=8))
        found[name]["variation"] = frequencies(sampling)
    found["adapters"] = mapped()
    print(json.dumps(found))


main()
