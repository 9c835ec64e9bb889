"""Environments, templates and parsers for tests of episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from learners import make_batch
from runs import steps
from tiny import make_text_model, make_vl_model, picture
from transformers import AutoTokenizer

from actors.episode import EpisodePlayer
from actors.worker import RolloutWorker
from learner.learner import Learner
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts, SharedPrompts
from tora.environments.processes import EnvironmentProcesses
from tora.environments.template import TurnTemplate
from tora.environments.tools import Parsed, ToolCall, ToolParser
from tora.environments.turns import Turns
from tora.models.vision.processor import ImageProcessor, has_image_processor
from tora.protocols import Engine
from tora.rewards.processes import RewardProcesses
from tora.types import Group, Prompt, Sampling, StopReason

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with tools, in Qwen's manner: the answers of one turn share a message."""

_PARTS = (
    "{%- macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for c in content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro -%}"
)
VL_TEMPLATE = _PARTS + TEMPLATE.replace("{{ m.content }}", "{{ show(m.content) }}")

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}

ENVIRONMENTS = '''
import asyncio, os, random, re, threading, time

from PIL import Image

class Counter:
    """Counts its calls."""

    def __init__(self, start: int = 0):
        self.start = start

    def reset(self, **row):
        self.count, self.row = self.start, row
        return row.get("observation")

    def look(self) -> str:
        """
        Look around.
        """
        self.count += 1
        return f"{self.count} of {self.row['answer']}"

    async def wait(self, seconds: float) -> str:
        """
        Wait.

        Args:
            seconds: How long.
        """
        await asyncio.sleep(seconds)
        return "waited"

    def act(self, how: str) -> str:
        """
        Do something bad.

        Args:
            how: What.
        """
        return _act(how)

    def get_reward(self):
        return float(self.count)


class Stepper(Counter):
    """Its first two turns earn something."""

    def get_turn_reward(self):
        bad = _act(self.row.get("how", ""))
        return bad if bad is not None else 0.5 if self.count <= 2 else 0


class Viewer(Counter):
    """Shows a picture with each answer, and at the beginning."""

    def reset(self, **row):
        Counter.reset(self, **row)
        return [{"type": "text", "text": " See "}, {"type": "image", "image": self._picture()}]

    def look(self) -> list:
        """
        Look around.
        """
        text = Counter.look(self)
        return [{"type": "image", "image": self._picture()}, {"type": "text", "text": text}]

    def _picture(self):
        """Another one for each call, in one of two sizes."""
        noise = random.Random(f"{self.count} {self.row['answer']}")
        width, height = 64, 32 * (1 + self.count % 2)
        return Image.frombytes("RGB", (width, height), noise.randbytes(3 * width * height))


class AsyncCounter(Counter):
    async def reset(self, **row):
        return Counter.reset(self, **row)

    async def get_reward(self):
        await asyncio.sleep(0)
        return float(self.count)


def _act(how):
    if how == "raise":
        raise ValueError("bad")
    if how == "sleep":
        time.sleep(3600)
    if how == "lock":  # one C call that holds the interpreter lock
        re.match("(a+)+$", "a" * 60 + "b")
    if how == "exit":
        os._exit(3)
    if how == "sys.exit":
        raise SystemExit(2)
    if how == "list":
        return [1]
    if how == "nan":
        return float("nan")
    return None


class BadReset(Counter):
    """Misbehaves where the row says so."""

    def reset(self, **row):
        Counter.reset(self, **row)
        return _act(row["how"]) if row["index"] == 1 else None


class BadReward(Counter):
    def get_reward(self):
        return _act("raise") if self.count == 1 else float(self.count)


def counts(environments, **columns):
    return [10.0 * e.count for e in environments]


def pid() -> int:
    """
    The process.
    """
    return os.getpid()


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Unmakeable:
    def __init__(self):
        raise RuntimeError("no server")

    def reset(self, **row): ...


class NoReset:
    def look(self) -> str:
        """
        Look.
        """
        return ""


class Undescribed:
    def reset(self, **row): ...

    def look(self, where) -> str:
        """
        Look.
        """
        return ""
'''


def make_tool_model(folder: Path, **options: Any) -> Path:
    """`make_text_model` with a chat template that shows tools."""
    make_text_model(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def always_look(text: str) -> Parsed:
    """A parser for random models, which never write a call: every finished turn looks around."""
    return Parsed("", (ToolCall("look", {}),))


def make_tool_vl_model(folder: Path, **options: Any) -> Path:
    """`make_vl_model` with a chat template that shows tools and images anywhere."""
    make_vl_model(folder, max_position_embeddings=1024, **options)
    (folder / "chat_template.jinja").write_text(VL_TEMPLATE)
    return folder


STOPS = tuple(range(20, 60))
"""Stop tokens of a random model beside its end token, so that its turns are short."""


class Agents:
    """A rollout worker that plays `Counter` from the working directory's `envs.py`."""

    def __init__(self, worker: RolloutWorker, template: TurnTemplate) -> None:
        self.worker, self._template = worker, template

    def prompt(self, number: int, **columns: Any) -> Prompt:
        """A model that takes images gets one."""
        source: Any = f"Look {number} times."
        row = {"answer": str(number), "index": 0, **columns}
        images = (picture(64, 64, number),) if self._template.placeholders else ()
        if images:
            source = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": source}]}]
        return Prompt(number, self._template.prompt(source, images), source, row, images)


@contextmanager
def agents(
    make_engine: Callable[[], Engine],
    folder: Path,
    *,
    parse: ToolParser = always_look,
    iterations: int | None = 4,
    max_tokens: int = 330,
    group_size: int = 4,
    factory: str = "envs.Counter",
    part_tokens: int | None = None,
    timeout_s: float = 10.0,
    memory_gib: float = 8.0,
    together: bool = True,
) -> Iterator[Agents]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = ImageProcessor(folder) if has_image_processor(folder) else None
    template = TurnTemplate(tokenizer, [SCHEMA], [tokenizer.eos_token_id], processor=processor)
    rewards = [{"_component_": "tora.environments.get_reward"}]

    def make_player() -> EpisodePlayer:
        limits = {"timeout_s": timeout_s, "reward_timeout_s": timeout_s, "num_processes": 2}
        limits["memory_gib"] = memory_gib
        environments = EnvironmentProcesses({"_component_": factory}, [], rewards, **limits)
        turns = Turns({"": template})
        return EpisodePlayer(
            environments, turns, lambda _: parse, tokenizer, max_tool_calling_iterations=iterations, together=together
        )

    sampling = Sampling(max_tokens, stop_token_ids=(*STOPS, tokenizer.eos_token_id))
    worker = RolloutWorker(
        make_engine,
        lambda: RewardProcesses(rewards, timeout_s=timeout_s, num_processes=1),
        tokenizer,
        sampling=sampling,
        eval_sampling=sampling,
        group_size=group_size,
        seed=0,
        part_tokens=part_tokens,
        make_player=make_player,
    )
    try:
        yield Agents(worker, template)
    finally:
        worker.close()


def write_environments(folder: Path) -> None:
    (folder / "envs.py").write_text(ENVIRONMENTS)


def check_exact(learner: Learner, groups: list[Group], share_prefix: bool) -> None:
    """The learner's log-probs of an episode's sampled tokens are the engine's, and its mismatch is that of numerics."""
    groups = [replace(g, rollouts=tuple(replace(r, reward=i) for i, r in enumerate(g.rollouts))) for g in groups]
    sequences = [(g.prompt, r, 0.0, i) for i, g in enumerate(groups) for r in g.rollouts]
    packing = SharedPrompts() if share_prefix else OwnPrompts()
    batch = pack(packing, sequences, [1.0] * len(sequences))
    assert len(batch.targets_N) == sum(len(r.versions) for g in groups for r in g.rollouts) < len(batch.tokens_T)
    np.testing.assert_allclose(learner.logprobs(batch, adapter=True), batch.actor_logprobs_N, atol=1e-4, rtol=0)
    metrics = learner.step(make_batch(groups, share_prefix=share_prefix)).metrics
    assert metrics["mismatch_kl"] < 1e-9 and metrics["loss/total"] != 0


def check_five_turns(group: Group) -> None:
    """`always_look` and four iterations: five turns that end in stop tokens, with the environment's text between."""
    for rollout in group.rollouts:
        assert (rollout.turns, rollout.tool_calls, rollout.tool_errors) == (5, 4, 0)
        assert rollout.stop_reason is StopReason.TOOL_LIMIT and rollout.reward == 4.0
        spans = np.flatnonzero(np.diff(rollout.sampled.astype(int)))
        assert len(spans) == 9, "the prompt's rest, then five turns with four answers between them"
        assert set(rollout.token_ids[[*spans[1::2], -1]]) <= {*STOPS, 2}
        for number in range(1, 5):
            answer = f"<tool_response>\n{number} of {group.prompt.columns['answer']}\n</tool_response>"
            assert rollout.text.count(answer) == 1


def check_five_pictures(groups: list[Group], image_token: int) -> None:
    """`Viewer` played by `always_look` with four iterations. After a turn that holds a placeholder there are no more
    pictures."""
    pictures = []
    for group in groups:
        for rollout in group.rollouts:
            assert (rollout.turns, rollout.tool_calls) == (5, 4)
            assert len(rollout.images) == 5 - rollout.tool_errors
            shown = (rollout.token_ids == image_token) & ~rollout.sampled
            assert np.count_nonzero(np.diff(np.concatenate([[0], shown])) == 1) == len(rollout.images)
            pictures.append(len(rollout.images))
    assert pictures.count(5) >= len(pictures) / 2
    assert len({image for group in groups for r in group.rollouts for image in r.images}) == 5 * len(groups)


def check_tool_run(rows: list[dict[str, Any]]) -> None:
    """The rows of a short run of `quickstart_tools`: some rollouts called the tool, and something was learned."""
    assert [row["version"] for row in steps(rows)] == [1, 2, 3]
    for row in steps(rows):
        assert 1 < row["rollout/turns_mean"] <= 3 and row["rollout/tool_calls_mean"] > 0.1
        assert "reward/failed/environment" not in row
    assert all(0 <= row["eval/accuracy"] <= 1 for row in rows if "eval/accuracy" in row)
    assert any(row["learner/grad_norm"] > 0 for row in steps(rows))
