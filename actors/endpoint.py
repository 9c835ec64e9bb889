"""An OpenAI-compatible endpoint in front of a rollout worker's engine.

Every episode has a session: a key, and an address `/sessions/KEY/v1` of its own; `/v1` with the key is the same. Chat
completions are sampled as the run samples, whatever temperature is asked for, and recorded: `actors.agent_session`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors.agent_session import AgentSession, NoRoom
from tora.environments.chat import ChatTemplate
from tora.environments.tools import Parsed, ToolCall, ToolParser
from tora.errors import ConfigError, RolloutError
from tora.types import Completion, SampleRequest

_START_S = 30.0
_MOST_AT_ONCE = 1024
"""Requests that wait for the engine at the same time."""
_UNSUPPORTED = ("stop", "response_format", "logprobs", "audio", "functions")


class Endpoint:
    def __init__(
        self,
        generate: Callable[[SampleRequest], Completion],
        template: ChatTemplate,
        make_parser: Callable[[list[dict[str, Any]]], ToolParser],
        host: str = "127.0.0.1",
    ) -> None:
        """`generate` is called from many threads. `make_parser`: from the tools that a request names. `host`: the
        address at which it listens, and which programs are told.

        Raises ConfigError if the web server is not installed, and RolloutError if it does not start.
        """
        try:
            import uvicorn
            from starlette.applications import Starlette
            from starlette.routing import Route
        except ImportError as error:
            raise ConfigError(f"agent needs a web server: pip install 'tora-rl[agents]' ({error.name})") from error
        self._generate, self._template, self._make_parser = generate, template, make_parser
        self._sessions: dict[str, AgentSession] = {}
        self._threads = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="chat")
        routes = [
            Route(f"{prefix}/v1{name}", handler, methods=[method])
            for prefix in ("", "/sessions/{key}")
            for name, handler, method in (("/chat/completions", self._chat, "POST"), ("/models", self._models, "GET"))
        ]
        self._socket = socket.socket()
        self._socket.bind((host, 0))
        self.address = f"http://{host}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        run = {"target": self._server.run, "kwargs": {"sockets": [self._socket]}}
        self._thread = threading.Thread(**run, name="endpoint", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RolloutError("the endpoint for agents did not start")
            time.sleep(0.01)

    def open(self, session: AgentSession) -> tuple[str, str]:
        """The session's base URL and key."""
        key = secrets.token_urlsafe(24)
        self._sessions[key] = session
        return f"{self.address}/sessions/{key}/v1", key

    def end(self, key: str) -> None:
        """Refuse what else the program asks."""
        self._sessions.pop(key, None)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _session_of(self, request: Any) -> AgentSession | None:
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        key = request.path_params.get("key", bearer)
        return self._sessions.get(key) if secrets.compare_digest(key.encode(), bearer.encode()) else None

    async def _models(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        if self._session_of(request) is None:
            return _refusal(401, "there is no session with this key, or it has ended")
        return JSONResponse({"object": "list", "data": [{"id": "policy", "object": "model", "owned_by": "tora"}]})

    async def _chat(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        session = self._session_of(request)
        if session is None:
            return _refusal(401, "there is no session with this key, or it has ended")
        try:
            body = await request.json()
            wanted = _checked(body)
            answer = await asyncio.get_running_loop().run_in_executor(self._threads, self._answer, session, *wanted)
        except NoRoom as error:
            return _refusal(400, str(error), "context_length_exceeded")
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # what a program sends may have any form
            return _refusal(
                400, f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            )
        except Exception as error:  # of the engine, whose worker reports it too
            return _refusal(500, f"{type(error).__name__}: {error}")
        if body.get("stream"):
            with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_streamed(answer, with_usage), media_type="text/event-stream")
        return JSONResponse(answer)

    def _answer(
        self, session: AgentSession, messages: list[dict[str, Any]], tools: list[dict[str, Any]], most: int | None
    ) -> dict[str, Any]:
        asked = session.ask(messages, tools, most)
        completion = self._generate(asked.request)
        ids = completion.token_ids.tolist()
        text = self._template.tokenizer.decode(ids[:-1] if completion.stopped else ids, skip_special_tokens=False)
        parsed = self._make_parser(tools)(text) if tools and completion.stopped else Parsed(text)
        calls = [call for call in parsed.calls if isinstance(call, ToolCall)]
        whole = len(calls) == len(parsed.calls)  # a malformed call stays in the text, where the program sees it
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content if whole else text}
        if calls and whole:
            message["tool_calls"] = [_call(call) for call in calls]
        session.answer(asked, completion, message)
        finish = "length" if not completion.stopped else "tool_calls" if "tool_calls" in message else "stop"
        used = {"prompt_tokens": len(asked.request.token_ids), "completion_tokens": len(ids)}
        return {
            "id": f"chatcmpl-{secrets.token_hex(8)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "policy",
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {**used, "total_tokens": sum(used.values())},
        }


def own_address() -> str:
    """This machine's address in its network; the loopback address if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address kept for documentation; nothing is sent
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function}


def _checked(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int | None]:
    """Messages, tools, and the most tokens. Raises ValueError for what is not supported."""
    for name in _UNSUPPORTED:
        if body.get(name):
            raise ValueError(f"{name} is not supported")
    if body.get("n", 1) not in (1, None):
        raise ValueError("n must be 1")
    messages, tools = body.get("messages"), body.get("tools") or []
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    if most is not None and (not isinstance(most, int) or most < 1):
        raise ValueError("max_tokens must be a positive integer")
    return messages, tools, most


def _refusal(status: int, reason: str, code: str | None = None) -> Any:
    """`code`: OpenAI's name for it, by which agents know what to do."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": reason, "type": kind, "code": code}}, status_code=status)


async def _streamed(answer: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """The answer as a stream of two chunks: all of it, then why it ended; and of a third that counts its tokens."""
    (choice,) = answer["choices"]
    message = dict(choice["message"])
    if "tool_calls" in message:
        message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
    same = {key: answer[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for delta, finish in ((message, None), ({}, choice["finish_reason"])):
        chunk = {**same, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        yield f"data: {json.dumps(chunk)}\n\n"
    if with_usage:
        yield f"data: {json.dumps({**same, 'choices': [], 'usage': answer['usage']})}\n\n"
    yield "data: [DONE]\n\n"
