"""Episodes: generate until a stop, a tool call or a limit; append what the tools answer; go on.

What the engine returned is never tokenised again: a turn's ids are appended as they are, and the tools' answers as the
chat template's text between two turns (`tora.environments.template`). As with `rollout.partial`, each turn is a request
of its own under the policy version that is newest when it begins, and every sampled token keeps its version.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from actors.continuation import concatenate, derived_seed, generate_in_parts
from tora.environments.content import Parts
from tora.environments.host import ToolResult, told
from tora.environments.processes import EnvironmentProcesses, Session
from tora.environments.template import TurnTemplate
from tora.environments.tools import MalformedCall, ToolCall, ToolParser
from tora.environments.turns import Turns
from tora.protocols import Engine
from tora.tasks.dataset import UNPROMPTED
from tora.types import Completion, FailedReward, Prompt, Rollout, SampleRequest, StopReason

_MOST_AT_ONCE = 1024
"""Episodes of a call that are played at the same time, apart from one another."""


class Episode:
    """One rollout while it is played."""

    def __init__(self, request: SampleRequest, session: Session, index: int) -> None:
        """`request`: the group's. `index`: the rollout's in its group."""
        self.request, self.session, self.index = request, session, index
        self.context = request.token_ids
        """Prompt and episode so far."""
        self.images: tuple[bytes, ...] = ()
        """What the environment showed so far."""
        self.messages: list[dict[str, Any]] = []
        """The turns and their answers, which reward functions get."""
        self.opening: str | Parts = ""
        """What the environment said at first."""
        self.stop_reason: StopReason | None = None
        self.failure: FailedReward | None = None
        self.turns = self.tool_calls = self.tool_errors = 0
        self.turn_rewards: list[float] = []
        """Of the turns that were answered."""
        self.sampled: list[bool] = []
        """[L]: which tokens of the episode the policy drew."""
        self.pending: Sequence[ToolCall | MalformedCall] = ()
        """The calls of the newest turn, not answered yet."""
        self._completions: list[Completion] = []

    @property
    def is_running(self) -> bool:
        return self.stop_reason is None and self.failure is None

    @property
    def room(self) -> int:
        """How many more tokens the episode may have."""
        return self.request.sampling.max_tokens - len(self.sampled)

    @property
    def token_ids(self) -> np.ndarray:
        """[L] int64, without the prompt."""
        return np.asarray(self.context[len(self.request.token_ids) :], dtype=np.int64)

    @cached_property
    def sampled_tokens(self) -> Completion:
        """The turns of a finished episode as one completion: its S sampled tokens."""
        assert not self.is_running and self._completions
        return functools.reduce(concatenate, self._completions)

    def rollout(self, *, text: str, reward: float, reward_parts: Mapping[str, float], kept_mass: float) -> Rollout:
        assert self.stop_reason is not None, "an episode that failed has no rollout"
        return Rollout(
            token_ids=self.token_ids,
            sampled=np.asarray(self.sampled),
            actor_logprobs=self.sampled_tokens.logprobs,
            versions=self.sampled_tokens.versions,
            stop_reason=self.stop_reason,
            text=text,
            reward=reward,
            reward_parts=reward_parts,
            kept_mass=kept_mass,
            turns=self.turns,
            tool_calls=self.tool_calls,
            tool_errors=self.tool_errors,
            turn_rewards=(*self.turn_rewards, *[0.0] * (self.turns - len(self.turn_rewards))),
            images=self.images,
            messages=([{"role": "environment", "content": self.opening}] if self.opening else []) + self.messages,
        )

    def next_request(self, num_samples: int) -> SampleRequest:
        """For the next turn of this episode, and of others with the same context."""
        seed = self.request.seed if self.turns == 0 else derived_seed(self.request.seed, self.index, len(self.context))
        sampling = replace(self.request.sampling, max_tokens=self.room)
        images = self.request.images + self.images
        return SampleRequest(self.context, num_samples, seed, sampling, images, self.request.pinned)

    def take(self, completion: Completion) -> None:
        """Append a turn as the engine returned it."""
        self._completions.append(completion)
        self.turns += 1
        self._append(completion.token_ids.tolist(), sampled=True)

    def add(self, token_ids: Sequence[int], images: Sequence[bytes] = ()) -> bool:
        """Append tokens that were not sampled, and the images of their placeholders; False, and nothing is appended, if
        no room to sample would be left."""
        if len(token_ids) >= self.room:
            return False
        self._append(token_ids, sampled=False)
        self.images += tuple(images)
        return True

    def has_sampled(self, token_ids: Sequence[int]) -> bool:
        """Whether the policy drew one of the tokens."""
        return any(np.isin(completion.token_ids, token_ids).any() for completion in self._completions)

    def _append(self, token_ids: Sequence[int], *, sampled: bool) -> None:
        self.context = (*self.context, *token_ids)
        self.sampled += [sampled] * len(token_ids)


@dataclass(frozen=True, slots=True)
class PlayedGroup:
    """A prompt's finished episodes, whose environments still stand."""

    prompt: Prompt
    episodes: Sequence[Episode]
    session: Session


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an episode waits for between two turns."""

    episode: Episode
    calls: Sequence[ToolCall | MalformedCall]
    answer: Future[Any]
    since: float


class EpisodePlayer:
    def __init__(
        self,
        environments: EnvironmentProcesses,
        turns: Turns,
        make_parser: Callable[[list[dict[str, Any]]], ToolParser],
        tokenizer: Any,
        *,
        max_tool_calling_iterations: int | None,
        together: bool = True,
    ) -> None:
        """`make_parser`: from the schemas of an environment's tools. `tokenizer` is only used to decode what the policy
        wrote. `together`: episodes take their turns at the same time, for an engine that runs one call at a time; else
        none waits for another after its group's first turn."""
        self.environments = environments
        self._turns, self._tokenizer = turns, tokenizer
        self._parsers = {name: make_parser(template.schemas) for name, template in turns.templates.items()}
        self._max_iterations, self._together = max_tool_calling_iterations, together

    @contextmanager
    def play(
        self, engine: Engine, prompts_P: Sequence[Prompt], requests_P: Sequence[SampleRequest], part: int | None
    ) -> Iterator[list[PlayedGroup]]:
        """The groups of `requests_P`, played to their ends. `part`: see `generate_in_parts`. Leaving the context gives
        the environments back."""
        groups: list[PlayedGroup] = []
        try:
            for prompt, request in zip(prompts_P, requests_P, strict=True):
                session = self.environments.open(request.num_samples, self._turns.name_of(prompt.columns))
                episodes = [Episode(request, session, index) for index in range(request.num_samples)]
                groups.append(PlayedGroup(prompt, episodes, session))
            self._begin(groups)
            running = [[e for e in group.episodes if e.is_running] for group in groups]
            if self._together:
                self._play_together(engine, [e for episodes in running for e in episodes], part)
            else:
                self._play_apart(engine, running, part)
            yield groups
        finally:
            for group in groups:
                group.session.close()

    def _play_together(self, engine: Engine, running: Sequence[Episode], part: int | None) -> None:
        """Turn by turn, until all have ended."""
        while running:
            self._turn(engine, running, part)
            self._answer([e for e in running if e.is_running])
            running = [e for e in running if e.is_running]

    def _play_apart(self, engine: Engine, groups: Sequence[Sequence[Episode]], part: int | None) -> None:
        """The first turns of a group share its prompt. Then each episode has a thread, in which it goes on as soon as
        its own tools have answered."""

        def finish(e: Episode) -> None:
            self._answer([e])
            self._play_together(engine, [e] if e.is_running else [], part)

        def begin(running: Sequence[Episode]) -> list[Future[None]]:
            self._turn(engine, running, part)
            return [pool.submit(copy_context().run, finish, e) for e in running if e.is_running]

        count = sum(map(len, groups))
        with ThreadPoolExecutor(max(1, min(count, _MOST_AT_ONCE)), thread_name_prefix="episode") as pool:
            begun = [pool.submit(copy_context().run, begin, running) for running in groups if running]
            for group in begun:
                for episode in group.result():
                    episode.result()

    def _template_of(self, e: Episode) -> TurnTemplate:
        return self._turns.templates[e.session.environment]

    def _begin(self, groups: Sequence[PlayedGroup]) -> None:
        """Reset the environments and append their observations."""
        asked = []
        for group in groups:
            source = {} if group.prompt.source == UNPROMPTED else {"prompt": group.prompt.source}
            row = {**source, **group.prompt.columns}
            for e in group.episodes:
                asked.append((group.prompt, _Asked(e, (), group.session.reset(e.index, row), time.monotonic())))
        for prompt, each in asked:
            e = each.episode
            observation = e.session.settle(e.index, "reset", each.answer, each.since)
            if isinstance(observation, FailedReward):
                e.failure = observation
                continue
            e.opening = observation.parts if observation else ""
            try:
                opening = self._template_of(e).opening(prompt.source, observation)
            except ValueError as error:  # an image that the model cannot take
                e.failure = FailedReward("environment", f"shows what cannot be shown: {error}")
                continue
            if not e.add(opening, observation.images if observation else ()):
                e.failure = FailedReward(
                    "environment",
                    f"opens the episode with {len(opening)} tokens, which leaves none of max_generated_tokens="
                    f"{e.request.sampling.max_tokens} to sample",
                )

    def _turn(self, engine: Engine, running: Sequence[Episode], part: int | None) -> None:
        """Sample the next turn of each episode. Equal contexts of a group share a request, and so its prefill."""
        alike: dict[tuple[int, tuple[int, ...], tuple[bytes, ...]], list[Episode]] = {}
        for e in running:
            alike.setdefault((id(e.session), e.context, e.images), []).append(e)
        requests = [episodes[0].next_request(len(episodes)) for episodes in alike.values()]
        for episodes, completions in zip(alike.values(), generate_in_parts(engine, requests, part), strict=True):
            for e, completion in zip(episodes, completions, strict=True):
                e.take(completion)
                self._end_or_call(e, completion)

    def _end_or_call(self, e: Episode, completion: Completion) -> None:
        ids = completion.token_ids[:-1] if completion.stopped else completion.token_ids
        text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        if not completion.stopped:
            e.stop_reason = StopReason.LENGTH
            e.messages.append({"role": "assistant", "content": text})
            return
        parsed = self._parsers[e.session.environment](text)
        calls = [c for c in parsed.calls if isinstance(c, ToolCall)]
        content = parsed.content if len(calls) == len(parsed.calls) else text
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls
            ]
        e.messages.append(message)
        if not parsed.calls:
            e.stop_reason = StopReason.STOP
        elif self._max_iterations is not None and e.turns > self._max_iterations:
            e.stop_reason = StopReason.TOOL_LIMIT
        else:
            e.pending = parsed.calls

    def _answer(self, waiting: Sequence[Episode]) -> None:
        """Call the tools that the episodes asked for, all at once, and append what they answer."""
        asked = []
        for e in waiting:
            calls = [c for c in e.pending if isinstance(c, ToolCall)]
            asked.append(_Asked(e, e.pending, e.session.call(e.index, calls), time.monotonic()))
        for each in asked:
            e = each.episode
            results = e.session.settle(e.index, "a tool", each.answer, each.since)
            if isinstance(results, FailedReward):
                e.failure = results
                continue
            self._append_answers(e, each.calls, results)

    def _append_answers(
        self, e: Episode, calls: Sequence[ToolCall | MalformedCall], results: Sequence[ToolResult]
    ) -> None:
        e.turn_rewards.append(sum(result.turn_reward for result in results))
        rest = iter(results)
        messages: list[dict[str, Any]] = []
        images: tuple[bytes, ...] = ()
        for call in calls:
            e.tool_calls += 1
            if isinstance(call, MalformedCall):
                name, content, failed = "unknown", told(call.reason), True
            else:
                result = next(rest)
                name, content, failed = call.name, result.content, result.error is not None
            if content.images and e.has_sampled(self._template_of(e).placeholders):
                # Engines take the first runs of placeholders for images, and the policy's own would be among them.
                content, failed = told("No image can be shown after a reply that holds an image's placeholder."), True
            e.tool_errors += failed
            messages.append({"role": "tool", "name": name, "content": content.parts})
            images += content.images
        try:
            answer = self._template_of(e).answers(messages, images)
        except ValueError as error:  # an image that the model cannot take
            e.failure = FailedReward("environment", f"shows what cannot be shown: {error}")
            return
        if e.add(answer, images):
            e.messages += messages
        else:
            e.stop_reason = StopReason.LENGTH

    def close(self) -> None:
        self.environments.close()
