"""`stop`, `stop_token_ids` and seeds: in the torch engine, in configs, and in training and evaluation alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import build, model_config
from stops import STOPS, cut, free_texts
from tiny import make_text_model, make_tokenizer

from actors.torch_engine.engine import TorchEngine
from actors.torch_engine.stop_strings import StopStrings
from tora.adapters.inject import snapshot
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.tasks.prompts import RunPrompts
from tora.types import SampleRequest, Sampling

PROMPTS = ((5, 9, 30, 41), (7, 8))


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(tmp_path: Path) -> None:
    model = build(model_config(make_text_model(tmp_path), "lora"))
    engine = TorchEngine(
        model, device=torch.device("cpu"), shared=True, max_rows=100, tokenizer=lambda: make_tokenizer()
    )
    engine.install(snapshot(model, 3))

    def generate(**changes: object) -> list[list[list[int]]]:
        requests = [SampleRequest(p, 4, 11, Sampling(24, **changes)) for p in PROMPTS]  # type: ignore[arg-type]
        answers = engine.generate(requests)
        for group in answers:
            for c in group:
                assert len(c.token_ids) == len(c.logprobs) == len(c.versions)
        return [[c.token_ids.tolist() for c in group] for group in answers]

    free = generate()
    stops = free_texts(make_tokenizer(), free)
    assert generate(stop=stops) == [[cut(make_tokenizer(), ids, stops) for ids in group] for group in free]
    assert generate(stop=stops) != free
    (group,) = engine.generate([SampleRequest(PROMPTS[0], 4, 11, Sampling(24, stop=stops))])
    assert [c.stopped for c in group] == [
        cut(make_tokenizer(), ids, stops) != ids or _ends(ids, stops) for ids in free[0]
    ]


def _ends(ids: list[int], stops: tuple[str, ...]) -> bool:
    return any(stop in make_tokenizer().decode(ids) for stop in stops)


@pytest.mark.parametrize(("text", "stop", "taken"), STOPS)
def test_where_a_stop_string_is_found(text: str, stop: str, taken: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    strings = StopStrings(tokenizer, [SampleRequest((5, 6), 1, 0, Sampling(99, stop=(stop, "never")))])
    found = [strings.step([0], [token])[0] for token in ids]
    end = found.index(True) + 1 if True in found else len(ids)
    assert tokenizer.decode(ids[:end]) == taken


def test_training_and_evaluation_stop_alike_unless_the_config_says_otherwise() -> None:
    def sampling(*overrides: str) -> tuple[Sampling, Sampling]:
        prompts = RunPrompts(load_config("quickstart", ["eval.num_prompts=2", *overrides]))
        return prompts.sampling, prompts.eval_sampling

    train, held_out = sampling("stop=[</answer>,x]", "stop_token_ids=[3]")
    assert train.stop == held_out.stop == ("</answer>", "x")
    assert 3 in train.stop_token_ids and train.stop_token_ids == held_out.stop_token_ids
    assert sampling("stop=[x]", "eval.stop=[]")[1].stop == ()
    plain = sampling()
    assert plain[0].stop == plain[1].stop == () and plain[0].stop_token_ids


WRONG = {
    'stop=[""]': 'stop=\\[""\\] must not hold an empty string',
    "stop=</answer>": 'stop="</answer>" must be a list',
    "eval.stop=['']": 'eval.stop=\\[""\\] must not hold an empty string',
    "seed=99999999999999999999": "seed=99999999999999999999 must be at most",
    "num_threads=100000": "num_threads=100000 must be at most 4096",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_settings_are_named(override: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[override]):
        load_config("quickstart", [override])


def test_what_stop_strings_cannot_be_used_with() -> None:
    parts = ["async_rl=true", "rollout.partial=8", "stop=[x]"]
    with pytest.raises(ConfigError, match=r"stop=\[\"x\"\] needs rollout.partial=null"):
        load_config("quickstart", parts)
    with pytest.raises(ConfigError, match=r"stop=\[\"x\"\] has no place in rollouts with environment_factory or tools"):
        load_config("quickstart_tools", ["stop=[x]"])
    with pytest.raises(ConfigError, match=r"stop_token_ids has 99999, and the model's tokens are 0 to"):
        RunPrompts(load_config("quickstart", ["stop_token_ids=[99999]"]))
