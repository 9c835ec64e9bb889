"""Programs that talk to the policy through the endpoint, with the `openai` client where it is installed."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import shake
from agents import STOPS, check_exact, make_tool_model
from learners import config
from torch_engines import engine_of
from transformers import AutoTokenizer

from actors.agent_player import AgentPlayer
from actors.agent_session import AgentSession
from actors.endpoint import Endpoint, own_address
from actors.worker import RolloutWorker
from learner.learner import Learner
from tora.config.load import load_config
from tora.environments.chat import ChatTemplate
from tora.environments.processes import EnvironmentProcesses
from tora.environments.tools import Parsed, ToolCall
from tora.errors import ConfigError
from tora.rewards.processes import RewardProcesses
from tora.types import Completion, Group, Prompt, SampleRequest, Sampling

pytest.importorskip("uvicorn")
PROGRAMS = '''
import json, urllib.request

def ask(base_url, api_key, messages, **more):
    body = json.dumps({"model": "policy", "messages": messages, "max_tokens": 12, **more}).encode()
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{base_url}/chat/completions", body, headers)) as answer:
        return json.load(answer)["choices"][0]["message"]

def chat(base_url, api_key, prompt, answer, **row):
    """Three turns, in the openai client's own words."""
    from openai import OpenAI
    client = OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": prompt}]
    for turn in range(3):
        streamed = turn == 1
        reply = client.chat.completions.create(
            model="policy", messages=messages, max_tokens=12, temperature=0.1, stream=streamed
        )
        if streamed:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
            message = {"role": "assistant", "content": text}
        else:
            message = reply.choices[0].message.model_dump(exclude_none=True)
        messages += [message, {"role": "user", "content": f"Turn {turn} of {answer}."}]
    return float(turn)

async def branch(base_url, api_key, prompt, **row):
    """A conversation of two turns; another answer to its first; and a sub-agent."""
    start = [{"role": "user", "content": prompt}]
    first = start + [ask(base_url, api_key, start), {"role": "user", "content": "Go on."}]
    ask(base_url, api_key, first)
    ask(base_url, api_key, first[:2] + [{"role": "user", "content": "No, stop."}])
    ask(base_url, api_key, [{"role": "user", "content": "You are a helper."}])
    return 1.0

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]

def tool(base_url, api_key, prompt, **row):
    messages = [{"role": "user", "content": prompt}]
    for _ in range(2):
        message = ask(base_url.split("/sessions")[0] + "/v1", api_key, messages, tools=TOOLS)
        messages.append(message)
        if calls := message.get("tool_calls"):
            assert json.loads(calls[0]["function"]["arguments"]) == {"at": "ü"}
            messages.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": "a wall"})
        else:
            messages.append({"role": "user", "content": "Look!"})
    return 1.0

def silent(**row):
    return 1.0

def broken(base_url, api_key, prompt, **row):
    ask(base_url, api_key, [{"role": "user", "content": prompt}])
    raise ValueError("bad")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tool_model(tmp_path_factory.mktemp("model"))
    (folder / "programs.py").write_text(PROGRAMS)
    return folder


@pytest.fixture(scope="module")
def learner(folder: Path) -> Learner:
    learner = Learner(config(folder), shares_model=True)
    shake(learner.model)
    return learner


@contextmanager
def playing(folder: Path, learner: Learner, program: str, parse: Any = Parsed) -> Iterator[RolloutWorker]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = [{"_component_": "tora.environments.get_reward"}]
    limits: dict[str, Any] = {"timeout_s": 60.0, "reward_timeout_s": 10.0, "num_processes": 1}
    setup = {"_component_": "tora.environments.program.Program", "program": f"programs.{program}"}

    def make_player() -> AgentPlayer:
        environments = EnvironmentProcesses(setup, [], rewards, **limits)
        template = ChatTemplate(tokenizer, (*STOPS, tokenizer.eos_token_id))
        return AgentPlayer(environments, template, lambda tools: parse, max_context=400, gathers=True)

    sampling = Sampling(330, stop_token_ids=(*STOPS, tokenizer.eos_token_id))
    worker = RolloutWorker(
        lambda: engine_of(learner),
        lambda: RewardProcesses(rewards, timeout_s=10.0, num_processes=1),
        tokenizer,
        sampling=sampling,
        eval_sampling=sampling,
        group_size=2,
        seed=0,
        make_player=make_player,
    )
    try:
        yield worker
    finally:
        worker.close()


def played(worker: RolloutWorker, tokenizer: Any, numbers: tuple[int, ...] = (3, 4)) -> list[Group]:
    first = ChatTemplate(tokenizer, STOPS).prompt("")
    prompts = [Prompt(n, first, f"Look {n} times.", {"answer": str(n)}) for n in numbers]
    return [r.with_prompt(p) for r, p in zip(worker.run_groups(prompts), prompts, strict=True)]


@pytest.fixture
def tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_program_of_the_openai_client_is_trained_on_exactly_what_was_sampled(folder, learner, tokenizer) -> None:
    pytest.importorskip("openai")
    with playing(folder, learner, "chat") as worker:
        groups = played(worker, tokenizer)
    for group in groups:
        assert [r.turns for r in group.rollouts] == [3, 3] and not group.failures
        assert group.rollouts[0].token_ids.tolist() != group.rollouts[1].token_ids.tolist(), "each has its own seed"
        for rollout in group.rollouts:
            given = tokenizer.decode(rollout.token_ids[~rollout.sampled])
            assert given.startswith(f"system\nCount.<|im_end|>\n<|im_start|>user\nLook {group.prompt.id} times.")
            assert all(f"<|im_start|>user\nTurn {turn} of {group.prompt.id}.<|im_end|>" in given for turn in (0, 1))
            assert "Turn 2" not in given and rollout.sampled[-1] and rollout.reward == 2.0
            assert [m["role"] for m in rollout.messages] == ["system", *["user", "assistant"] * 3]
    check_exact(learner, groups, share_prefix=False)


def test_branches_and_sub_agents_are_sequences_of_their_own(folder, learner, tokenizer) -> None:
    with playing(folder, learner, "branch") as worker:
        groups = played(worker, tokenizer, (3,))
    (group,) = groups
    assert [r.turns for r in group.rollouts] == [2, 1, 1] * 2 and not group.failures
    for whole, other, helper in (group.rollouts[:3], group.rollouts[3:]):
        turns = np.flatnonzero(np.diff(whole.sampled.astype(int), prepend=0) == 1)
        shared = whole.token_ids[: turns[1]]
        first = shared[whole.sampled[: turns[1]]]
        np.testing.assert_array_equal(
            other.token_ids[: turns[0] + len(first)], whole.token_ids[: turns[0] + len(first)]
        )
        assert not other.sampled[: turns[0] + len(first)].any(), "what was sampled once is trained on once"
        assert "You are a helper." in helper.text
    check_exact(learner, groups, share_prefix=True)


def test_tool_calls_reach_the_program_and_their_ids_stay(folder, learner, tokenizer) -> None:
    calls = lambda text: Parsed("", (ToolCall("look", {"at": "ü"}),))  # noqa: E731
    with playing(folder, learner, "tool", calls) as worker:
        (group,) = played(worker, tokenizer, (3,))
    for rollout in group.rollouts:
        assert (rollout.turns, rollout.tool_calls) == (
            2,
            sum(m.get("tool_calls") is not None for m in rollout.messages),
        )
        stopped = rollout.messages[1].get("tool_calls") is not None
        assert ("<tool_response>\na wall\n</tool_response>" in rollout.text) == stopped
    assert any(rollout.tool_calls for rollout in group.rollouts)
    check_exact(learner, [group], share_prefix=False)


@pytest.mark.parametrize(
    ("program", "reason"), [("silent", "asked the policy nothing"), ("broken", "raised ValueError: bad")]
)
def test_a_program_that_fails_costs_its_rollouts(folder, learner, tokenizer, program: str, reason: str) -> None:
    with playing(folder, learner, program) as worker:
        (group,) = played(worker, tokenizer, (3,))
    assert not group.rollouts and [f.name for f in group.failures] == ["agent"] * 2
    assert group.failures[0].reason == reason


def post(url: str, key: str, body: Any) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def test_what_the_endpoint_refuses(tokenizer) -> None:
    """And nothing of it is trained on."""
    template = ChatTemplate(tokenizer, STOPS)
    group: Any = None
    chat = AgentSession(SampleRequest((template.first_token,), 1, 0, Sampling(40)), group, 0, template)
    never: Any = pytest.fail
    endpoint = Endpoint(never, template, never)
    url, key = endpoint.open(chat)
    hello = [{"role": "user", "content": "hello"}]
    for wrong_key in ("", "x", key + "x"):
        assert post(url, wrong_key, {"messages": hello})[0] == 401
    for body, reason in [
        ({}, "messages must be a list"),
        ({"messages": []}, "at least one message"),
        ({"messages": hello, "n": 2}, "n must be 1"),
        ({"messages": hello, "stop": ["a"]}, "stop is not supported"),
        ({"messages": hello, "max_tokens": 0.5}, "max_tokens must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content must be text"),
        ({"messages": [{"role": "user", "content": "x" * 60}]}, "leave no room"),
        ({"messages": ["hello"]}, "AttributeError"),
        ([1], "AttributeError"),
    ]:
        status, said = post(url, key, body)
        assert status == 400 and reason in said, (body, said)
    assert chat.finish() == []
    endpoint.end(key)
    assert post(url, key, {"messages": hello})[0] == 401
    endpoint.close()


def completion(*ids: int) -> Completion:
    some = np.full(len(ids), -0.5, dtype=np.float32)
    return Completion(np.array(ids), some, some, np.zeros(len(ids), dtype=np.int64), stopped=True)


def test_what_a_program_did_not_wait_for_is_not_trained_on(tokenizer) -> None:
    template = ChatTemplate(tokenizer, STOPS)
    group: Any = None
    chat = AgentSession(SampleRequest((template.first_token,), 1, 0, Sampling(300)), group, 0, template)
    said = {"role": "assistant", "content": "a"}
    hello = [{"role": "user", "content": "hello"}]
    asked = chat.ask(hello, [], None)
    chat.ask(hello, [], None)  # never answered
    chat.answer(asked, completion(5, STOPS[0]), said)
    more = [*hello, said, {"role": "user", "content": "more"}]
    late = chat.ask(more, [], None)
    assert late.request.token_ids[: len(asked.request.token_ids) + 2] == (*asked.request.token_ids, 5, STOPS[0])
    assert late.request.seed != asked.request.seed
    (episode,) = chat.finish()
    tokens = episode.token_ids.tolist()
    chat.answer(late, completion(6, STOPS[0]), said)
    assert chat.finish() == [episode] and episode.token_ids.tolist() == tokens and tokens[-2:] == [5, STOPS[0]]
    assert [m["content"] for m in episode.messages] == ["hello", "a"] and episode.turns == 1


def test_two_answers_to_one_question_are_two_sequences(tokenizer) -> None:
    """Asked at the same time, as a program that votes does."""
    template = ChatTemplate(tokenizer, STOPS)
    group: Any = None
    chat = AgentSession(SampleRequest((template.first_token,), 1, 0, Sampling(300)), group, 0, template)
    hello = [{"role": "user", "content": "hello"}]
    first, second = chat.ask(hello, [], None), chat.ask(hello, [], None)
    assert first.request.token_ids == second.request.token_ids and first.request.seed != second.request.seed
    chat.answer(second, completion(6, STOPS[0]), {"role": "assistant", "content": "b"})
    chat.answer(first, completion(5, STOPS[0]), {"role": "assistant", "content": "a"})
    assert [e.token_ids.tolist()[-2:] for e in chat.finish()] == [[6, STOPS[0]], [5, STOPS[0]]]


STRIPS = ("\n{{ m.content }}<", "\n{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<")
LABELS = ("<|im_start|>{{ m.role }}", "<|im_start|>{{ 'earlier ' if m.role == 'assistant' }}{{ m.role }}")
LATEST = (STRIPS[0], STRIPS[1].replace("if m.role", "if loop.index < 3 and m.role"))


@pytest.mark.parametrize(
    ("change", "said", "turns"),
    [
        (STRIPS, "a", [3]),
        (STRIPS, "<think>why</think>a", [1, 1, 1]),
        (STRIPS, "why</think>a", [1, 1, 1]),
        (LATEST, "<think>why</think>a", [1, 2]),
        (LABELS, "a", [1, 1, 1]),
        (("", ""), "<think>why</think>a", [3]),
    ],
)
def test_a_turn_that_the_template_rewrites_later_ends_its_sequence(
    tokenizer, change: tuple[str, str], said: str, turns: list[int]
) -> None:
    """What follows is asked as a deployed model is: with the turn as the template shows it."""
    tokenizer.chat_template = tokenizer.chat_template.replace(*change)
    template = ChatTemplate(tokenizer, STOPS)
    group: Any = None
    chat = AgentSession(SampleRequest((template.first_token,), 1, 0, Sampling(600)), group, 0, template)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
    for number in range(3):
        asked = chat.ask(messages, [], None)
        if len(turns) == 3:
            whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert asked.request.token_ids == template.encode(whole)
        ids = template.encode(said)
        reply = {"role": "assistant", "content": f"{said}{number}"}
        chat.answer(asked, completion(*ids, *template.encode(str(number)), STOPS[0]), reply)
        messages = [*messages, reply, {"role": "user", "content": "more"}]
    episodes = chat.finish()
    assert [e.turns for e in episodes] == turns
    assert sum(map(sum, (e.sampled for e in episodes))) == 3 * (len(template.encode(said)) + 2)


@pytest.mark.parametrize("stream", [False, True])
def test_the_endpoint_at_the_machines_own_address(tokenizer, stream: bool) -> None:
    """With a key there as on the loopback address, and nothing on the loopback address. Both addresses of a session."""
    template = ChatTemplate(tokenizer, STOPS)
    group: Any = None
    chat = AgentSession(SampleRequest((template.first_token,), 1, 0, Sampling(60)), group, 0, template)
    endpoint = Endpoint(lambda _: completion(5, STOPS[0]), template, lambda _: Parsed, own_address())
    url, key = endpoint.open(chat)
    assert url.startswith(f"http://{own_address()}:")
    hello = {"messages": [{"role": "user", "content": "hello"}], "stream": stream}
    assert post(url, "x", hello)[0] == 401
    status, said = post(
        f"{endpoint.address}/v1" if stream else url, key, {**hello, "stream_options": {"include_usage": True}}
    )
    used = {"prompt_tokens": len(chat.finish()[0].context) - 2, "completion_tokens": 2}
    chunks = [json.loads(line.removeprefix("data: ")) for line in said.splitlines() if "{" in line]
    assert status == 200 and chunks[-1]["usage"] == {**used, "total_tokens": sum(used.values())}
    if stream:
        assert [bool(chunk["choices"]) for chunk in chunks] == [True, True, False]
        assert chunks[1]["choices"][0]["finish_reason"] == "stop" and said.endswith("data: [DONE]\n\n")
    endpoint.close()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agent=programs.chat", "tools=[tora.tasks.calculator.calculate]"], "agent has no place beside"),
        (["agent=programs"], 'agent="programs" must be a dotted path'),
    ],
)
def test_settings_that_contradict(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", overrides)
