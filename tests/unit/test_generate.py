"""The torch engine: what it samples and which log-probs it reports."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import build, model_config, shake
from decoders import packed_logits
from tiny import make_text_model

from actors.torch_engine.engine import TorchEngine
from actors.torch_engine.sampling import draw, truncate
from tora.adapters.inject import snapshot
from tora.errors import RolloutError, SyncError
from tora.types import SampleRequest, Sampling

PROMPTS = [(5, 9, 30, 41), (7, 8), tuple(range(1, 130))]
"""The last prompt outgrows the cache's initial size while it generates."""
CPU = torch.device("cpu")


def requests(sampling: Sampling, prompts=PROMPTS, num_samples: int = 3) -> list[SampleRequest]:
    return [SampleRequest(p, num_samples, 11 + p[0], sampling) for p in prompts]


@pytest.fixture(params=["lora", "dora", "dora_cache"])
def model(request, tmp_path: Path):
    model = build(model_config(make_text_model(tmp_path, "qwen2"), request.param))
    shake(model)
    return model


def ready(model, max_rows: int = 100) -> TorchEngine:
    engine = TorchEngine(model, device=CPU, shared=True, max_rows=max_rows)
    engine.install(snapshot(model, 3))
    return engine


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(20),
        Sampling(20, temperature=0.7),
        Sampling(20, top_k=5),
        Sampling(20, temperature=1.3, top_p=0.8, top_k=40),
        Sampling(20, temperature=0.0),
    ],
)
def test_logprobs_are_those_of_the_policy_and_of_the_distribution_drawn_from(model, sampling: Sampling) -> None:
    for request, completions in zip(requests(sampling), ready(model).generate(requests(sampling)), strict=True):
        for completion in completions:
            ids = torch.tensor([*request.token_ids, *completion.token_ids.tolist()])
            with torch.no_grad():
                logits = packed_logits(model, [ids])[len(request.token_ids) - 1 : -1]
            if sampling.temperature:
                logits = logits / sampling.temperature
            drawn_from = truncate(logits, sampling.top_k, sampling.top_p).log_softmax(1)
            for found, expected in (
                (completion.logprobs, logits.log_softmax(1)),
                (completion.sampling_logprobs, drawn_from),
            ):
                chosen = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(found), chosen, atol=1e-3, rtol=1e-4)
            assert set(completion.versions.tolist()) == {3}


def test_a_rollout_depends_on_its_seed_alone(model) -> None:
    together = ready(model).generate(requests(Sampling(12)))
    apart = [ready(model).generate([r])[0] for r in requests(Sampling(12))]
    in_parts = ready(model, max_rows=4).generate(requests(Sampling(12)))
    for a, b, c in zip(together, apart, in_parts, strict=True):
        assert (
            [x.token_ids.tolist() for x in a] == [x.token_ids.tolist() for x in b] == [x.token_ids.tolist() for x in c]
        )
    samples = [tuple(x.token_ids) for group in together for x in group]
    assert len(set(samples)) == len(samples)


def test_stop_tokens_end_completions_and_are_part_of_them(model) -> None:
    free = ready(model).generate(requests(Sampling(30)))
    stop = int(free[0][0].token_ids[4])
    stopped = ready(model).generate(requests(Sampling(30, stop_token_ids=(stop,))))
    seen = 0
    for before, after in zip((c for g in free for c in g), (c for g in stopped for c in g), strict=True):
        ids = before.token_ids.tolist()
        expected = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert after.token_ids.tolist() == expected
        assert after.stopped == (stop in ids)
        seen += after.stopped
    assert seen


def test_a_copy_serves_what_it_was_sent_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    cfg = model_config(make_text_model(tmp_path), "dora_cache")
    sender, copy = build(cfg), build(cfg)
    engine = TorchEngine(copy, device=CPU, shared=False, max_rows=100)
    with pytest.raises(RolloutError, match="before its first snapshot"):
        engine.generate(requests(Sampling(4)))
    shake(sender)
    sent = snapshot(sender, 5)
    report = engine.install(sent)
    assert (report.version, report.nbytes, report.sha256, report.num_modules) == (5, sent.nbytes, sent.sha256, 14)
    greedy = Sampling(10, temperature=0.0)
    ours, theirs = engine.generate(requests(greedy)), ready(sender).generate(requests(greedy))
    assert [c.token_ids.tolist() for g in ours for c in g] == [c.token_ids.tolist() for g in theirs for c in g]
    other = build(model_config(tmp_path, "dora_cache", lora_targets=["q_proj"]))
    with pytest.raises(SyncError):
        engine.install(snapshot(other, 6))


@pytest.mark.parametrize("kind", ["lora", "dora_cache"])
def test_a_pinned_version_is_served_beside_the_newest(tmp_path: Path, kind: str) -> None:
    cfg = model_config(make_text_model(tmp_path), kind)
    sender = build(cfg)
    engine = TorchEngine(build(cfg), device=CPU, shared=False, pins=True, max_rows=100)
    sent, expected = {}, {}
    for version in (3, 4):
        shake(sender)
        sent[version] = snapshot(sender, version)
        expected[version] = ready(sender).generate(requests(Sampling(10)))
    engine.install(sent[3])
    report = engine.pin(sent[3])
    assert (report.version, report.sha256) == (3, sent[3].sha256)
    engine.install(sent[4])
    pinned = [replace(r, pinned=True) for r in requests(Sampling(10))]
    for asked, version in ((pinned, 3), (requests(Sampling(10)), 4), (pinned, 3)):
        for ours, theirs in zip(engine.generate(asked), expected[version], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.token_ids.tolist() == b.token_ids.tolist() and set(a.versions.tolist()) == {version}
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    engine.pin(sent[4])
    assert {v for group in engine.generate(pinned) for c in group for v in c.versions.tolist()} == {4}
    other = build(model_config(tmp_path, kind, lora_targets=["q_proj"]))
    with pytest.raises(SyncError):
        engine.pin(snapshot(other, 6))
    assert {v for group in engine.generate(requests(Sampling(4))) for c in group for v in c.versions.tolist()} == {4}
    with pytest.raises(ValueError, match="without room"):
        ready(sender).pin(sent[4])


def test_truncation_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (truncate(logits, 2, 1.0) > -torch.inf).tolist() == [[True, True, False, False]]
    assert (truncate(logits, 0, 0.6) > -torch.inf).tolist() == [[True, True, False, False]]
    assert (truncate(logits, 0, 0.5) > -torch.inf).tolist() == [[True, False, False, False]]
    assert (truncate(logits, 3, 0.9) > -torch.inf).tolist() == [[True, True, True, False]]


def test_draws_follow_the_distribution_and_never_leave_its_support() -> None:
    probability = torch.tensor([0.0, 0.1, 0.6, 0.0, 0.3, 0.0])
    uniform = (torch.arange(10000) + 0.5) / 10000
    tokens = draw(probability.log().expand(10000, -1), uniform, greedy=False)
    torch.testing.assert_close(torch.bincount(tokens, minlength=6) / 10000, probability, atol=1e-3, rtol=0)
    edges = draw(probability.log().expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), greedy=False)
    assert edges.tolist() == [1, 4]
