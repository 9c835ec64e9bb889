"""`llm_judge` against a local server of OpenAI's chat API, and `reward_model` on a tiny classifier."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from tora.config.load import load_config
from tora.errors import ConfigError
from tora.rewards import llm_judge
from tora.rewards.processes import RewardProcesses
from tora.rewards.rewarder import build_rewarder
from tora.types import FailedReward, Prompt

PROMPT = Prompt(0, (1,), "What is 1 + 1?", {"answer": "2"})


class Judge(BaseHTTPRequestHandler):
    """Scores the digit in the answer. `?` has no score; `busy` is refused twice, `never` always; `slow` takes 0.3 s."""

    seen: list[dict[str, Any]]
    most_at_once = now = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"].partition("Answer:")[2]
        with self.lock:
            self.seen.append({**body, "path": self.path, "key": self.headers.get("Authorization"), "text": text})
            asked = sum(each["text"] == text for each in self.seen)
            type(self).now += 1
            type(self).most_at_once = max(self.most_at_once, self.now)
        if "slow" in text:
            time.sleep(0.3)
        with self.lock:
            type(self).now -= 1
        refused = 503 if "never" in text or ("busy" in text and asked < 3) else 401 if "forbidden" in text else 200
        number = re.search(r"\d", text)
        said = "I cannot say" if "?" in text else f"Fine. Score: 1\nOn reflection. **Score: {number and number[0]}**"
        answer = json.dumps(
            {"choices": [{"message": {"content": said}}]} if refused == 200 else {"error": "no"}
        ).encode()
        self.send_response(refused)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[type[Judge], str]]:
    class Mine(Judge):
        seen: list[dict[str, Any]] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Mine, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def ask(rewarder: Any, *texts: str) -> list[Any]:
    return rewarder(PROMPT, texts, [[1]] * len(texts))


def component(url: str, **arguments: Any) -> dict[str, Any]:
    return {"_component_": "tora.rewards.llm_judge", "url": url, "model": "judge", "retries": 2, **arguments}


def test_a_group_is_judged_concurrently_and_the_same_answer_once(server, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, url = server
    monkeypatch.setenv("MY_KEY", "secret")
    rewarder = build_rewarder([component(url, api_key_env="MY_KEY", options={"max_tokens": 9})])
    start = time.perf_counter()
    assert ask(rewarder, "slow 4", "slow 5", "slow 4", "slow 6") == [{"llm_judge": n / 10} for n in (4, 5, 4, 6)]
    assert judge.most_at_once == 3 and time.perf_counter() - start < 3
    assert ask(rewarder, "slow 5") == [{"llm_judge": 0.5}] and len(judge.seen) == 3
    first = judge.seen[0]
    assert (first["path"], first["key"], first["model"]) == ("/v1/chat/completions", "Bearer secret", "judge")
    assert (first["temperature"], first["max_tokens"]) == (0, 9)
    assert "Question:\nWhat is 1 + 1?\n\nAnswer:\nslow " in first["messages"][0]["content"]


def test_refused_requests_are_repeated_and_failures_cost_only_their_completion(server) -> None:
    judge, url = server
    rewarder = RewardProcesses([component(url)], timeout_s=20, num_processes=1)
    try:
        good, busy, silent, never, forbidden = ask(rewarder, "7", "busy 3", "?", "never", "forbidden")
    finally:
        rewarder.close()
    assert (good, busy) == ({"llm_judge": 0.7}, {"llm_judge": 0.3})
    for failed, words in ((silent, "has no score"), (never, "answered 503"), (forbidden, "answered 401")):
        assert isinstance(failed, FailedReward) and failed.parts is None and words in failed.reason
    asked = [each["text"].strip() for each in judge.seen]
    assert asked.count("7") == 1 and asked.count("busy 3") == 3 and asked.count("forbidden") == 2


def test_concurrency_is_bounded_and_columns_are_filled_in(server) -> None:
    judge, url = server
    rewarder = build_rewarder([component(url, concurrency=2, instruction="{x} {answer} Answer: {completion}")])
    ask(rewarder, *(f"slow {i}" for i in range(5)))
    assert judge.most_at_once == 2 and judge.seen[0]["messages"][0]["content"].startswith("{x} 2 Answer: slow ")


def test_no_server_is_a_failed_reward() -> None:
    rows = ask(build_rewarder([component("http://127.0.0.1:1", retries=0)]), "1")
    assert isinstance(rows[0], FailedReward) and "the judge at http://127.0.0.1:1 gave no answer" in rows[0].reason


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"url": "localhost"}, "must begin with http"),
        ({"scale": 0}, "scale=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s=nan"),
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "a"}, "has no group"),
    ],
)
def test_impossible_arguments_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        llm_judge(**{"url": "http://a", "model": "m", **wrong})


def test_a_config_may_name_them_and_arguments_are_checked() -> None:
    reward = "{_component_: tora.rewards.llm_judge, url: 'http://a', model: m, weight: 2}"
    assert load_config("quickstart", [f"rewards=[{reward}]"]).rewards[0]["weight"] == 2
    with pytest.raises(ConfigError, match=r"rewards.0.modl=\"m\" is not an argument of tora.rewards.llm_judge"):
        load_config("quickstart", [f"rewards=[{reward.replace('model', 'modl')}]"])


# reward_model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=320, num_labels=1, pad_token_id=0, max_position_embeddings=128, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_scores_are_the_classifiers_whatever_the_batch(classifier: Path) -> None:
    reward = {"_component_": "tora.rewards.reward_model", "model": str(classifier), "batch_size": 2}
    texts = ("short", "a rather longer answer", "2")
    rewarder = RewardProcesses([reward], timeout_s=60, num_processes=2)
    try:
        found = [row["reward_model"] for row in ask(rewarder, *texts)]
        chat = Prompt(0, (1,), [{"role": "user", "content": PROMPT.source}], {})
        assert rewarder(chat, texts, [[1]] * 3) == [{"reward_model": score} for score in found]
    finally:
        rewarder.close()
    tokenizer, model = make_tokenizer(), AutoModelForSequenceClassification.from_pretrained(classifier)
    for text, score in zip(texts, found, strict=True):
        chat = [{"role": "user", "content": PROMPT.source}, {"role": "assistant", "content": text}]
        inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            assert score == pytest.approx(float(model(**inputs).logits[0, 0]), abs=1e-5)


def test_what_is_no_reward_model_is_refused(classifier: Path, tmp_path: Path) -> None:
    for model, words in ((tmp_path, "cannot be loaded"), (classifier, "batch_size=0")):
        arguments = {"model": str(model), "batch_size": 0}
        with pytest.raises(ConfigError, match=words):
            build_rewarder([{"_component_": "tora.rewards.reward_model", **arguments}])
