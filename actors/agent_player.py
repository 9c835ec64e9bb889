"""Episodes that a user's program plays: it asks the endpoint, and the worker trains on what it was answered."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from actors.agent_session import AgentSession
from actors.continuation import generate_in_parts
from actors.endpoint import Endpoint
from actors.episode import Episode, PlayedGroup
from tora.environments.chat import ChatTemplate
from tora.environments.processes import EnvironmentProcesses
from tora.environments.tools import ToolCall, ToolParser
from tora.protocols import Engine
from tora.types import Completion, FailedReward, Prompt, SampleRequest


class AgentPlayer:
    """Stands where `EpisodePlayer` does. A program may begin several conversations; each is an episode of its group,
    with the program's reward."""

    def __init__(
        self,
        environments: EnvironmentProcesses,
        template: ChatTemplate,
        make_parser: Callable[[list[dict[str, Any]]], ToolParser],
        *,
        max_context: int,
        gathers: bool,
        host: str = "127.0.0.1",
    ) -> None:
        """`environments`: of `tora.environments.program.Program`. `max_context`: tokens of a conversation. `gathers`:
        whether the engine runs one call at a time, so that requests that wait for it are put together. `host`: the
        endpoint's address."""
        self.environments = environments
        self._template, self._max_context = template, max_context
        self._engine: Engine | None = None
        self._part: int | None = None
        self._gather = _Gather(self._generate_all) if gathers else None
        parsers: dict[str, ToolParser] = {}

        def parser_of(tools: list[dict[str, Any]]) -> ToolParser:
            key = json.dumps(tools, sort_keys=True)
            if key not in parsers:
                parsers[key] = make_parser(tools)
            return parsers[key]

        self._endpoint = Endpoint(self._generate, template, parser_of, host)

    @contextmanager
    def play(
        self, engine: Engine, prompts_P: Sequence[Prompt], requests_P: Sequence[SampleRequest], part: int | None
    ) -> Iterator[list[PlayedGroup]]:
        """As `EpisodePlayer.play`."""
        self._engine, self._part = engine, part
        opened = [self.environments.open(request.num_samples) for request in requests_P]
        keys: list[str] = []
        try:
            running: list[list[tuple[AgentSession, Future[Any], float]]] = []
            for prompt, request, session in zip(prompts_P, requests_P, opened, strict=True):
                sampling = replace(request.sampling, max_tokens=self._max_context - len(request.token_ids))
                request = replace(request, sampling=sampling)
                row = {"prompt": prompt.source, **prompt.columns}
                running.append([])
                for index in range(request.num_samples):
                    chat = AgentSession(request, session, index, self._template)
                    url, key = self._endpoint.open(chat)
                    keys.append(key)
                    session.reset(index, row)  # in the same thread, before the program
                    call = ToolCall("play", {"base_url": url, "api_key": key})
                    running[-1].append((chat, session.call(index, [call]), time.monotonic()))
            yield [
                PlayedGroup(
                    prompt, [e for i, each in enumerate(chats) for e in self._ended(session, i, *each)], session
                )
                for prompt, session, chats in zip(prompts_P, opened, running, strict=True)
            ]
        finally:
            for key in keys:
                self._endpoint.end(key)
            for session in opened:
                session.close()

    def _ended(self, session: Any, index: int, chat: AgentSession, future: Future[Any], since: float) -> list[Episode]:
        """The episodes of a program that has ended; one that failed if the program did."""
        results = session.settle(index, "the program", future, since)
        if isinstance(results, FailedReward):
            failure: FailedReward | None = results
        else:
            error = results[-1].error
            failure = None if error is None else FailedReward("agent", error.reason)
        episodes = chat.finish()
        if failure is None and episodes:
            return episodes
        failed = Episode(chat.request, session, index)
        failed.failure = failure or FailedReward("agent", "asked the policy nothing")
        return [failed]

    def _generate(self, request: SampleRequest) -> Completion:
        if self._gather is not None:
            return self._gather(request)
        return self._generate_all([request])[0]

    def _generate_all(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        assert self._engine is not None
        return [completion for (completion,) in generate_in_parts(self._engine, requests, self._part)]

    def close(self) -> None:
        self._endpoint.close()
        self.environments.close()


class _Gather:
    """Whoever gets the engine runs all requests that wait for it."""

    def __init__(self, generate: Callable[[Sequence[SampleRequest]], list[Completion]]) -> None:
        self._generate = generate
        self._waiting: list[tuple[SampleRequest, Future[Completion]]] = []
        self._adding, self._running = threading.Lock(), threading.Lock()

    def __call__(self, request: SampleRequest) -> Completion:
        future: Future[Completion] = Future()
        with self._adding:
            self._waiting.append((request, future))
        with self._running:
            with self._adding:
                batch, self._waiting = self._waiting, []
            if batch:
                try:
                    completions = self._generate([request for request, _ in batch])
                except Exception as error:
                    for _, each in batch:
                        each.set_exception(error)
                else:
                    for (_, each), completion in zip(batch, completions, strict=True):
                        each.set_result(completion)
        return future.result()
